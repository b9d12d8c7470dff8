"""JSON files of data sets, with one clear error for what is not as published."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparc_loss.evaluation.dataset import DataError


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error


@contextmanager
def fields_of(path: Path, expected: str) -> Iterator[None]:
    """Around the use of a file's content: a missing or wrong field raises a DataError that names the file."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} is not as published ({type(error).__name__}: {error}); expected {expected}"
        ) from error
