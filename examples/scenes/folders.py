"""Folders that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def drafted(folder: Path) -> Iterator[Path]:
    """Give a draft to fill, which takes the folder's name at the end of the block, or goes if the block fails.

    Raises:
        FileExistsError: `folder` is there.
    """
    if folder.exists():
        raise FileExistsError(f"folder {folder} exists; expected a new one")
    draft = folder.with_name(f".{folder.name}-draft-{os.getpid()}")
    draft.mkdir(parents=True)
    try:
        yield draft
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft)
        raise
