"""The processes of the tests end with the tests."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import run_python

pytestmark = pytest.mark.slow
LAUNCH = """
import sys
sys.path.insert(0, sys.argv[1])
from launching import run_python
run_python("-c", sys.argv[2], sys.argv[3])
"""
# Writes the number of a process that goes on for long, then waits for it.
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1], "w").write(str(child.pid))
child.wait()
"""


def wait_until(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc")
def test_a_killed_test_leaves_no_process_behind(tmp_path):
    noted = tmp_path / "process"
    launch = [sys.executable, "-c", LAUNCH, str(Path(__file__).parent), PARENT, str(noted)]
    with subprocess.Popen(launch) as test:
        wait_until(lambda: noted.exists() and noted.read_text(encoding="utf-8"))
        test.send_signal(signal.SIGKILL)
    wait_until(lambda: not is_alive(int(noted.read_text(encoding="utf-8"))))


def test_output_and_exit_code_are_those_of_the_command():
    finished = run_python("-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")
    assert (finished.returncode, finished.stdout.split()) == (3, ["out", "err"])
    assert run_python("-c", f"import os; os.kill(os.getpid(), {int(signal.SIGTERM)})").returncode == -signal.SIGTERM
