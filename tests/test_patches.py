"""patches/ on a copy of the open_clip that runs the tests, by the commands of patches/README.md."""

import re
import shutil
import subprocess
from pathlib import Path

import open_clip
import pytest
from launching import SPARC, STOCK, assert_same_weights, logged_losses, run_python, train, write_coca
from major_version import MAJOR_VERSION

from sparc_loss.open_clip_versions import TESTED

PATCHES = Path(__file__).parent.parent / "patches"
PRISTINE = Path(open_clip.__file__).parents[1]
# The part of the README, the packages that its patch changes, and the models that are trained with it.
HEADING, PACKAGES, MODELS = {
    3: ("## open_clip_torch 3.3.0 installed by pip", ("open_clip_train",), ("model",)),
    4: ("## open_clip's main branch, installed by pip", ("open_clip", "open_clip_train"), ("model", "coca")),
}[MAJOR_VERSION]

pytestmark = [pytest.mark.skipif(shutil.which("git") is None, reason="git applies the patch"), pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(folder):
    """The tiny data, with a CoCa beside its model."""
    write_coca(folder)
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with a patched copy of the packages, to stand first on sys.path."""
    site = tmp_path_factory.mktemp("site")
    for package in PACKAGES:
        shutil.copytree(PRISTINE / package, site / package, ignore=shutil.ignore_patterns("__pycache__"))
    run_readme_commands(site, "Apply (all or nothing):")
    return site


def run_readme_commands(site: Path, heading: str) -> None:
    """Run the shell block under `heading` after the block that makes PATCH, on `site`."""
    readme = (PATCHES / "README.md").read_text(encoding="utf-8")
    readme = readme[readme.index(HEADING) :]
    prepare = re.search(r"```bash\n(PATCH=\$\(mktemp\)\n.*?)^SITE=.*?```", readme, re.DOTALL | re.MULTILINE).group(1)
    command = re.search(re.escape(heading) + r"\n```bash\n(.*?)```", readme, re.DOTALL).group(1)
    script = f"set -e\n{prepare}SITE={site}\n{command}"
    finished = subprocess.run(["bash", "-c", script], cwd=PATCHES.parent, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr


def on_path(site: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(site)}


@pytest.mark.parametrize("model", MODELS)
def test_the_patch_and_the_launcher_train_the_same_weights(folder, site, model):
    flags = ("--model", f"local-dir:{folder / model}", "--loss", "sparc", "--sparc-fine-grained-weight", "2")
    names = [f"{model}-{by}" for by in ("by-patch", "by-launcher", "by-launcher-on-patched")]
    log = train(folder, *flags, name=names[0], launcher=STOCK, env=on_path(site))
    assert len(logged_losses(log, "Fine_grained_loss")) > 1
    train(folder, *flags, name=names[1], launcher=SPARC)
    train(folder, *flags, name=names[2], launcher=SPARC, env=on_path(site))
    assert_same_weights(folder, *names)


def test_loss_clip_and_no_flag_train_as_the_stock_open_clip(folder, site):
    train(folder, name="stock", launcher=STOCK)
    train(folder, name="no-flag", launcher=STOCK, env=on_path(site))
    train(folder, "--loss", "clip", name="clip", launcher=STOCK, env=on_path(site))
    assert_same_weights(folder, "stock", "no-flag", "clip")


def test_the_check_that_the_patch_is_in_tells_the_two_apart(site):
    command = ("-c", "from open_clip_train.params import parse_args; parse_args(['--loss', '?'])")
    patched, stock = run_python(*command, env=on_path(site)), run_python(*command)
    assert patched.returncode == 2
    assert "unknown loss '?' (known losses: clip, filip, flair, gloria, mgca, pacl, sparc)" in patched.stdout
    assert (stock.returncode, stock.stdout.strip()) == (0, "")


def test_reverting_leaves_open_clip_as_it_was(site, tmp_path):
    shutil.copytree(site, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    run_readme_commands(tmp_path, "Revert:")
    for package in PACKAGES:
        files = sorted(path.relative_to(PRISTINE) for path in (PRISTINE / package).rglob("*.py"))
        assert sorted(path.relative_to(tmp_path) for path in (tmp_path / package).rglob("*.py")) == files
        assert all((tmp_path / file).read_bytes() == (PRISTINE / file).read_bytes() for file in files)


def test_the_patch_is_for_the_newest_release_we_claim():
    assert (PATCHES / f"open_clip-{TESTED[-1]}.patch").is_file()
