"""Run a function in several real processes that talk over gloo."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 120


def run_ranks(function: Callable[..., Any], world_size: int, folder: Path, *arguments: object) -> list[Any]:
    """What `function(rank, world_size, *arguments)` returns in each of `world_size` processes.

    A process that fails fails the caller with its traceback; ranks that wait for each other for ever are ended.
    """
    context = mp.spawn(_rank, (function, world_size, folder, arguments), nprocs=world_size, join=False)
    deadline = time.monotonic() + TIMEOUT
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{world_size} ranks did not end within {TIMEOUT} s: a deadlock")
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(world_size)]


def _rank(
    rank: int, function: Callable[..., Any], world_size: int, folder: Path, arguments: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'rendezvous'}", rank=rank, world_size=world_size)
    result = function(rank, world_size, *arguments)
    torch.save(result, folder / f"rank{rank}.pt")
    dist.destroy_process_group()
