"""Files that a command writes: whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_output(path: Path, *inputs: str | Path | None) -> None:
    """Raise ValueError for a place where no file can be written, or where one of the inputs is."""
    problem = None
    if any(each is not None and _is_same(path, Path(each)) for each in inputs):
        problem = "is also an input, which would be lost"
    elif path.is_dir():
        problem = "is a folder"
    elif path.exists() and not path.is_file():
        problem = "is a device or a pipe"
    elif not os.access(path.resolve().parent, os.W_OK):
        problem = "is in no folder that can be written to"
    if problem:
        raise ValueError(f"argument --output: '{path}' {problem}; expected a file")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A draft to write to, with the same ending, that takes the place of `path` if nothing is raised.

    A link stays, and the file that it leads to is replaced.
    """
    path = path.resolve()
    draft = path.with_name(f".{os.getpid()}{path.suffix}")  # no longer than the longest name that a disk allows
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _is_same(path: Path, other: Path) -> bool:
    try:
        return path.samefile(other)
    except OSError:  # one of them does not exist, or is a name and no path
        return False
