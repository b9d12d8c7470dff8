"""A failure between two epochs must not end a run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def training_goes_on(what: str) -> Iterator[None]:
    """Turn an exception in the block into one warning with its traceback: "`what` failed; training goes on"."""
    try:
        yield
    except Exception:
        logging.warning(f"{what} failed; training goes on", exc_info=True)
