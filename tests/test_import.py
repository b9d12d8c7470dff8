"""`import sparc_loss` needs torch and einops only; what needs open_clip says so when it is used."""

import json
import subprocess
import sys

import pytest
import torch

import sparc_loss

pytestmark = pytest.mark.slow

WITHOUT_OPEN_CLIP = """
import json, sys
sys.modules["open_clip"] = None  # what `import open_clip` finds where it is not installed

import sparc_loss, sparc_loss.functional
from torch import nn

def error_of(action):
    try:
        action()
    except ImportError as error:
        return str(error)

print(json.dumps({
    "SparcLoss": error_of(sparc_loss.SparcLoss),
    "SparcLoss with a global loss": error_of(lambda: sparc_loss.SparcLoss(global_loss=nn.Identity())),
    "surface_embeddings": error_of(lambda: sparc_loss.surface_embeddings),
    "restore": error_of(lambda: sparc_loss.restore),
    "dir": dir(sparc_loss),
    "modules": [name for name in sys.modules if name.split(".")[0] in ("timm", "transformers")],
}))
"""


@pytest.fixture(scope="module")
def without_open_clip() -> dict[str, str]:
    """What happens in a process in which open_clip cannot be imported."""
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_OPEN_CLIP], capture_output=True, text=True, timeout=120, check=False
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_importing_works_without_open_clip(without_open_clip: dict[str, str]) -> None:
    assert {"SparcLoss", "surface_embeddings", "restore"} <= set(without_open_clip["dir"])


def test_importing_loads_neither_timm_nor_transformers(without_open_clip: dict) -> None:
    assert without_open_clip["modules"] == []


@pytest.mark.parametrize("name", ["SparcLoss", "surface_embeddings", "restore"])
def test_without_open_clip_the_error_names_the_install_command(without_open_clip: dict, name: str) -> None:
    assert name in without_open_clip[name]
    assert "pip install 'sparc-loss[train]'" in without_open_clip[name]


def test_without_open_clip_sparc_loss_takes_another_global_loss(without_open_clip: dict) -> None:
    assert without_open_clip["SparcLoss with a global loss"] is None


def test_public_names_are_there_and_listed() -> None:
    for name in sparc_loss.__all__:
        assert getattr(sparc_loss, name)
        assert name in dir(sparc_loss)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'sparc_loss' has no attribute 'SparkLoss'"):
        _ = sparc_loss.SparkLoss


def test_the_functional_example_runs() -> None:
    """The example in the docstring of `fine_grained_loss`."""
    import doctest

    from sparc_loss import functional

    results = doctest.testmod(functional, extraglobs={"torch": torch})
    assert results.attempted > 0
    assert results.failed == 0


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["open_clip"] = None  # what an import then finds where they are not installed

import sparc_loss
from sparc_loss import cli
for argv in (["--help"], ["--version"], ["trian"], ["train", "--loss", "sprac"]):
    try:
        cli.main(argv)
    except SystemExit as error:
        print(error.code)
"""


def test_help_version_and_wrong_names_do_not_wait_for_torch() -> None:
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, timeout=60, check=False
    )
    assert process.returncode == 0, process.stderr
    assert "sparc-loss 0." in process.stdout
    assert "unknown command 'trian'" in process.stderr
    assert "argument --loss: unknown loss 'sprac'; known: clip, filip, flair" in process.stderr


def test_the_modules_of_the_loss_are_there_without_an_import_of_their_own() -> None:
    code = "import sparc_loss; print(*(getattr(sparc_loss, name).__name__ for name in sparc_loss._MODULES))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert process.stdout.split() == [f"sparc_loss.{name}" for name in sparc_loss._MODULES], process.stderr
