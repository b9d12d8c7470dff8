"""patches/open_clip-main-*.patch on a copy of the checkout, by the commands of patches/README.md."""

import re
import shutil
import subprocess
from pathlib import Path

import open_clip
import pytest
import torch
from launching import (
    COCA_CONFIG,
    SPARC,
    STOCK,
    checkpoint,
    logged_losses,
    run_python,
    train,
    write_model,
    write_tiny_data,
)
from major_version import only_open_clip_4

pytestmark = [only_open_clip_4, pytest.mark.skipif(shutil.which("git") is None, reason="git applies the patch")]
PATCHES = Path(__file__).parents[2] / "patches"
PRISTINE = Path(open_clip.__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patched")
    write_tiny_data(folder)
    write_model(folder / "coca", COCA_CONFIG)
    coca = open_clip.CoCa(**{key: value for key, value in COCA_CONFIG.items() if key != "custom_text"})
    # open_clip leaves this one to whatever the memory held.
    torch.nn.init.normal_(coca.text_decoder.text_projection, std=0.1)
    torch.save(coca.state_dict(), folder / "coca" / "open_clip_pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with a patched copy of both packages, to stand first on sys.path."""
    site = tmp_path_factory.mktemp("site")
    for package in ("open_clip", "open_clip_train"):
        shutil.copytree(PRISTINE / package, site / package, ignore=shutil.ignore_patterns("__pycache__"))
    run_readme_commands(site, "Apply (all or nothing):")
    return site


def run_readme_commands(site: Path, heading: str) -> None:
    """Run the shell block under `heading` after the block that makes PATCH, on `site`."""
    readme = (PATCHES / "README.md").read_text(encoding="utf-8")
    readme = readme[readme.index("## open_clip's main branch, installed by pip") :]
    prepare = re.search(r"```bash\n(PATCH=\$\(mktemp\)\n.*?)^SITE=.*?```", readme, re.DOTALL | re.MULTILINE).group(1)
    command = re.search(re.escape(heading) + r"\n```bash\n(.*?)```", readme, re.DOTALL).group(1)
    script = f"set -e\n{prepare}SITE={site}\n{command}"
    finished = subprocess.run(["bash", "-c", script], cwd=PATCHES.parent, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr


def on_path(site: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(site)}


def assert_same_weights(folder: Path, *names: str) -> None:
    first, *others = (checkpoint(folder, name)["state_dict"] for name in names)
    for other in others:
        assert first.keys() == other.keys()
        assert [name for name in first if not torch.equal(first[name], other[name])] == []


@pytest.mark.parametrize("model", ["model", "coca"])
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
    for package in ("open_clip", "open_clip_train"):
        files = sorted(path.relative_to(PRISTINE) for path in (PRISTINE / package).rglob("*.py"))
        assert sorted(path.relative_to(tmp_path) for path in (tmp_path / package).rglob("*.py")) == files
        assert all((tmp_path / file).read_bytes() == (PRISTINE / file).read_bytes() for file in files)
