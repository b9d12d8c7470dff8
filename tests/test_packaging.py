"""The wheel, installed where nothing else is, and what it says of itself."""

import subprocess
import sys
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import sparc_loss

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_package_typed_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "sparc_loss/py.typed" in names
    assert {f"sparc_loss/show/templates/page.{kind}" for kind in ("html.jinja", "css", "js")} <= set(names)
    assert {name.split("/")[0] for name in names} == {
        "sparc_loss",
        f"sparc_loss-{sparc_loss.__version__}.dist-info",
    }


def test_installed_in_an_empty_environment_it_offers_the_entry_point_and_the_script(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path)], check=True, timeout=120)
    python = tmp_path / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True, timeout=120)
    listed = subprocess.run(
        [
            python,
            "-c",
            "from importlib.metadata import entry_points as e; print(*e(group='open_clip.losses'), "
            "*e(group='console_scripts', name='sparc-loss'))",
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    assert "EntryPoint(name='sparc', value='sparc_loss.plugins.sparc:SPARC', group='open_clip.losses')" in listed
    assert "value='sparc_loss.cli:main'" in listed


def test_the_core_needs_torch_and_einops_only():
    dependencies = map(Requirement, requires("sparc-loss"))
    assert {dependency.name for dependency in dependencies if dependency.marker is None} == {"torch", "einops"}


def test_the_version_has_its_entry_in_the_changelog():
    assert f"## {sparc_loss.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
