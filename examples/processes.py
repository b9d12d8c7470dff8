"""Processes of one thread each, which end with the process that began them, also when that one is killed."""

import multiprocessing
import os
import threading
from multiprocessing.pool import Pool

import torch


def process_pool(workers: int) -> Pool:
    """So many processes; they begin as new ones, because a fork does not survive the threads that torch holds."""
    return multiprocessing.get_context("spawn").Pool(workers, _begin)


def _begin() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
