"""Loading a checkpoint in plain open_clip, in the version that runs the tests and in the one behind it."""

from pathlib import Path

import open_clip
import pytest
from launching import run_python
from major_version import MAJOR_VERSION

# Without this place on sys.path, a process finds the open_clip that is installed.
CHECKOUT = str(Path(open_clip.__file__).parents[1])
VERSIONS = ("this", "installed") if MAJOR_VERSION == 4 else ("this",)


def assert_loads_without_sparc_loss(
    path: Path,
    config: Path,
    versions: tuple[str, ...] = VERSIONS,
    env: dict[str, str] | None = None,
    **options: object,
) -> None:
    """Every value of the checkpoint is in a plain model of `config` under its name; `options` are create_model's."""
    for version in versions:
        leave_out = CHECKOUT if version == "installed" else ""
        finished = run_python(
            "-c",
            "import sys\n"
            f"sys.path[:] = [path for path in sys.path if path != {leave_out!r}]\n"
            "import torch, open_clip\n"
            f"open_clip.add_model_config({str(config)!r})\n"
            f"model = open_clip.create_model({config.stem!r}, pretrained={str(path)!r}, **{options!r})\n"
            "assert 'sparc_loss' not in sys.modules\n"
            f"saved = torch.load({str(path)!r}, weights_only=True)['state_dict']\n"
            "state_dict = model.state_dict()\n"
            "assert state_dict.keys() == saved.keys()\n"
            "assert all(torch.equal(value, saved[name]) for name, value in state_dict.items())\n"
            "print(open_clip.__version__)",
            env=env,
        )
        assert finished.returncode == 0, finished.stdout
        if leave_out and not finished.stdout.split()[-1].startswith("3."):
            pytest.skip("no open_clip 3 is installed to load it in")
