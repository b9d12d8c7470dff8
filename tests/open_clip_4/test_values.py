"""The same weights and the same batch give the same terms and gradients in both major versions of open_clip."""

from pathlib import Path

import open_clip
import pytest
import torch
from launching import COCA_CONFIG, MODEL_CONFIG, run_python, write_model
from major_version import only_open_clip_4
from torch.testing import assert_close

pytestmark = only_open_clip_4
SCRIPT = Path(__file__).with_name("one_step.py")
CASES = ("sparc", "filip", "pacl", "gloria", "mgca", "flair", "sparc, siglip", "sparc, distill", "sparc, coca")


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """What one_step.py saves in each major version: of this process's open_clip, and of the one behind it."""
    folder = tmp_path_factory.mktemp("steps")
    write_model(folder / "clip", MODEL_CONFIG)
    write_model(folder / "coca", COCA_CONFIG)
    checkout = str(Path(open_clip.__file__).parents[1])
    found = []
    for name, leave_out in (("newer", ()), ("older", (checkout,))):
        finished = run_python(str(SCRIPT), str(folder), str(folder / f"{name}.pt"), *leave_out)
        assert finished.returncode == 0, finished.stdout
        found.append(torch.load(folder / f"{name}.pt"))
    newer, older = found
    if older["version"].startswith("4."):
        pytest.skip("no open_clip 3 is installed to compare with")
    return newer, older


@pytest.mark.parametrize("case", CASES)
def test_terms_and_gradients_are_those_of_open_clip_3(steps, case):
    newer, older = (step[case] for step in steps)
    assert newer["terms"].keys() == older["terms"].keys()
    assert_close(newer["terms"], older["terms"], rtol=1e-6, atol=0)
    assert newer["gradients"].keys() == older["gradients"].keys()
    assert_close(newer["gradients"], older["gradients"], rtol=1e-4, atol=1e-6)
