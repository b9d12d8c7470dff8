"""Run a command and end it, with all its children, when the process that started this one is gone.

`python supervised.py FD COMMAND...`, with FD the reading end of a pipe whose other end the parent alone has open.
This process leads a group of its own, which its children are in.
"""

import os
import signal
import subprocess
import sys
import threading
import time

ENDING = threading.Event()


def main(alive: str, *command: str) -> None:
    child = subprocess.Popen(command)
    threading.Thread(target=end_with_parent, args=(int(alive), child.pid), daemon=True).start()
    code = child.wait()
    if ENDING.is_set():
        os.killpg(0, signal.SIGKILL)  # the child's own children
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)  # the thread still waits


def end_with_parent(alive: int, child: int) -> None:
    os.read(alive, 1)  # returns when the other end is closed, also by the parent's death
    ENDING.set()
    os.kill(child, signal.SIGTERM)  # torchrun ends its workers, which have groups of their own
    time.sleep(5)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
