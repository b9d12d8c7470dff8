"""Files that a command writes: whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_output(path: Path) -> None:
    """Raise ValueError for a place where no file can be written."""
    problem = None
    if path.is_dir():
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
    draft = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
