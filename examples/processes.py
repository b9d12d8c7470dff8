"""Processes of one thread each, which end with the process that began them, also when that one is killed."""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.pool import Pool

import torch


@contextmanager
def process_pool(workers: int) -> Iterator[Pool]:
    """So many processes; they begin as new ones, because a fork does not survive the threads that torch holds."""
    with multiprocessing.get_context("spawn").Pool(workers, _begin) as pool:
        yield pool
        # Else they are killed, before they have cleaned up.
        pool.close()
        pool.join()


def _begin() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
