"""The open_clip releases that the hooks were tested with. pyproject.toml's extra `train` names the same range."""

TESTED = ("3.0.0", "3.1.0", "3.2.0", "3.3.0")


class UntestedVersionError(RuntimeError):
    """open_clip's version is none that the hooks were tested with."""


def check_version(version: str) -> None:
    """Raise UntestedVersionError unless the tests ran with this version of open_clip."""
    if version not in TESTED:
        raise UntestedVersionError(
            f"open_clip_torch {version} is installed; sparc_loss.train was tested with {', '.join(TESTED)} "
            f"and changes nothing in others: pip install 'open_clip_torch=={TESTED[-1]}'"
        )
