"""The processes of the examples."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.processes import process_pool

pytestmark = pytest.mark.slow

SCRIPT = """
import multiprocessing
import time
from multiprocessing.util import Finalize
from examples.processes import process_pool

def work(seconds):
    global lock
    lock = multiprocessing.Lock()
    print("working", flush=True)
    time.sleep(seconds)
    Finalize(None, time.sleep, [1], exitpriority=1)  # before the lock is given back

if __name__ == "__main__":
    with process_pool(2) as pool:
        pool.map(work, [{seconds}] * 2)
"""


@pytest.fixture
def begin(tmp_path):
    """Begins a process with two others that work for so many seconds."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}

    def begin(seconds: int) -> subprocess.Popen:
        (tmp_path / "script.py").write_text(SCRIPT.format(seconds=seconds), encoding="utf-8")
        command = [sys.executable, tmp_path / "script.py"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    return begin


def test_a_process_has_one_thread():
    with process_pool(1) as pool:
        assert pool.apply(torch.get_num_threads) == 1


def test_processes_that_are_done_leave_nothing_behind(begin):
    assert begin(0).communicate() == ("working\n" * 2, "")


def test_processes_end_when_the_one_that_began_them_is_killed(begin):
    parent = begin(300)
    assert parent.stdout is not None
    assert [parent.stdout.readline() for _ in range(2)] == ["working\n"] * 2
    parent.kill()
    # Its output ends when the last process that writes there has ended.
    parent.communicate(timeout=60)
