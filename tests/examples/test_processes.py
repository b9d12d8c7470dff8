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
import time
from examples.processes import process_pool

def work(_):
    print("working", flush=True)
    time.sleep(300)

if __name__ == "__main__":
    with process_pool(2) as pool:
        pool.map(work, range(2))
"""


def test_a_process_has_one_thread():
    with process_pool(1) as pool:
        assert pool.apply(torch.get_num_threads) == 1


def test_processes_end_when_the_one_that_began_them_is_killed(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "script.py"], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert parent.stdout is not None
    assert [parent.stdout.readline() for _ in range(2)] == ["working\n"] * 2
    parent.kill()
    # Its output ends when the last process that writes there has ended.
    parent.communicate(timeout=60)
