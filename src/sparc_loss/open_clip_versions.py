"""The versions of open_clip that the tests ran with, and what differs between them."""

# Releases on PyPI. pyproject.toml's extra `train` has the same range, with later patch releases.
TESTED = ("3.0.0", "3.1.0", "3.2.0", "3.3.0")
# Versions of open_clip's main branch, at the commit in patches/: `make test-main OPEN_CLIP=path`.
TESTED_UNRELEASED = ("4.2.0.dev0",)


class UntestedVersionError(RuntimeError):
    """The installed open_clip has a version that the tests did not run with."""


def check_version(installed: str) -> str | None:
    """A warning for a patch release that was not tested; None for a tested version.

    Raises:
        UntestedVersionError: no version with the same major and minor number was tested.
    """
    if installed in TESTED + TESTED_UNRELEASED:
        return None
    tested = {_minor(each): each for each in TESTED}.get(_minor(installed))
    if tested is not None and installed.replace(".", "").isdecimal():
        return f"open_clip_torch {installed} is installed; sparc_loss.train was tested with {tested}"
    raise UntestedVersionError(
        f"open_clip_torch {installed} is installed; sparc_loss.train was tested with {', '.join(TESTED)}, and "
        f"{', '.join(TESTED_UNRELEASED)} of its main branch, and does not change others: "
        f"pip install 'open_clip_torch=={TESTED[-1]}'"
    )


def major_version(installed: str) -> int:
    """The first number of a version: open_clip 3 has create_loss, open_clip 4 has tasks."""
    return int(installed.split(".")[0])


def logs_diagnostics(installed: str) -> bool:
    """Whether training logs a loss's further outputs; open_clip 3 adds them to the loss."""
    return major_version(installed) >= 4


def _minor(installed: str) -> tuple[str, ...]:
    return tuple(installed.split(".")[:2])
