"""patches/open_clip-3.3.0.patch on a copy of the installed open_clip, by the commands of patches/README.md."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from launching import SPARC, STOCK, checkpoint, logged_losses, run_python, train, write_tiny_data

from sparc_loss.open_clip_versions import TESTED

PATCHES = Path(__file__).parent.parent / "patches"

pytestmark = [pytest.mark.skipif(shutil.which("git") is None, reason="git applies the patch"), pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patched")
    write_tiny_data(folder)
    return folder


@pytest.fixture(scope="module")
def pristine():
    return Path(importlib.util.find_spec("open_clip_train").origin).parent


@pytest.fixture(scope="module")
def site(tmp_path_factory, pristine):
    """A folder with a patched copy of open_clip_train, to stand first on sys.path."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(pristine, site / "open_clip_train", ignore=shutil.ignore_patterns("__pycache__"))
    run_readme_commands(site, "Apply (all or nothing):")
    return site


def run_readme_commands(site: Path, heading: str) -> None:
    """Run the shell block under `heading` after the block that makes PATCH, on `site`."""
    readme = (PATCHES / "README.md").read_text(encoding="utf-8")
    readme = readme[readme.index("## open_clip_torch 3.3.0 installed by pip") :]
    prepare = re.search(r"```bash\n(PATCH=\$\(mktemp\)\n.*?)^SITE=.*?```", readme, re.DOTALL | re.MULTILINE).group(1)
    command = re.search(re.escape(heading) + r"\n```bash\n(.*?)```", readme, re.DOTALL).group(1)
    script = f"set -e\n{prepare}SITE={site}\n{command}"
    finished = subprocess.run(["bash", "-c", script], cwd=PATCHES.parent, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr


def on_path(site: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(site)}


def test_the_patch_and_the_launcher_train_the_same_weights(folder, site):
    log = train(folder, "--loss", "sparc", name="by-patch", launcher=STOCK, env=on_path(site))
    assert len(logged_losses(log, "Fine_grained_loss")) > 1
    train(folder, name="by-launcher", launcher=SPARC)
    train(folder, name="by-launcher-on-patched", launcher=SPARC, env=on_path(site))
    expected = checkpoint(folder, "by-launcher")["state_dict"]
    for name in ("by-patch", "by-launcher-on-patched"):
        weights = checkpoint(folder, name)["state_dict"]
        assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_loss_clip_and_no_flag_train_as_the_stock_open_clip(folder, site):
    train(folder, name="stock", launcher=STOCK)
    train(folder, name="no-flag", launcher=STOCK, env=on_path(site))
    train(folder, "--loss", "clip", name="clip", launcher=STOCK, env=on_path(site))
    expected = checkpoint(folder, "stock")["state_dict"]
    for name in ("no-flag", "clip"):
        weights = checkpoint(folder, name)["state_dict"]
        assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_the_check_that_the_patch_is_in_tells_the_two_apart(site):
    command = ("-c", "from open_clip_train.params import parse_args; parse_args(['--loss', '?'])")
    patched, stock = run_python(*command, env=on_path(site)), run_python(*command)
    assert patched.returncode == 2
    assert "unknown loss '?' (known losses: clip, filip, flair, gloria, mgca, pacl, sparc)" in patched.stdout
    assert (stock.returncode, stock.stdout.strip()) == (0, "")


def test_reverting_leaves_open_clip_as_it_was(site, pristine, tmp_path):
    shutil.copytree(site, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    run_readme_commands(tmp_path, "Revert:")
    reverted = tmp_path / "open_clip_train"
    files = sorted(path.relative_to(pristine) for path in pristine.rglob("*.py"))
    assert sorted(path.relative_to(reverted) for path in reverted.rglob("*.py")) == files
    assert all((reverted / file).read_bytes() == (pristine / file).read_bytes() for file in files)


def test_the_patch_is_for_the_newest_release_we_claim():
    assert (PATCHES / f"open_clip-{TESTED[-1]}.patch").is_file()
