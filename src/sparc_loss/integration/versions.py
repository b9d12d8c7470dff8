"""The open_clip versions that the hooks were tested with, and which of our files each generation of them needs."""

import importlib
from types import ModuleType

# Releases on PyPI. pyproject.toml's extra `train` names the same range.
TESTED = ("3.0.0", "3.1.0", "3.2.0", "3.3.0")
# Of open_clip's main branch, at the commit that patches/ names: `make test-main OPEN_CLIP=path`.
TESTED_UNRELEASED = ("4.2.0.dev0",)


class UntestedVersionError(RuntimeError):
    """open_clip's version is none that the hooks were tested with."""


def check_version(version: str) -> None:
    """Raise UntestedVersionError unless the tests ran with this version of open_clip."""
    if version not in TESTED + TESTED_UNRELEASED:
        raise UntestedVersionError(
            f"open_clip_torch {version} is installed; sparc_loss.train was tested with {', '.join(TESTED)}, and "
            f"{', '.join(TESTED_UNRELEASED)} of its main branch, and changes nothing in others: "
            f"pip install 'open_clip_torch=={TESTED[-1]}'"
        )


def logs_metrics(version: str) -> bool:
    """Whether training logs what a loss returns beside its terms, instead of adding it to them."""
    return generation(version) >= 4


def generation(version: str) -> int:
    """The first number of a version: 3 has create_loss, 4 has tasks."""
    return int(version.split(".")[0])


def module_of_generation(version: str) -> ModuleType:
    """`open_clip_3.py` or `open_clip_4.py`: all of ours that differs between them; imports open_clip_train."""
    return importlib.import_module(f"sparc_loss.integration.open_clip_{generation(version)}")
