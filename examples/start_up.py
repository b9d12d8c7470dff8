"""How soon the commands answer, beside `import torch` alone. `make bench` runs it."""

import statistics
import subprocess
import sys
import time
from typing import Any

_CLI = ("-c", "import sys; from sparc_loss.cli import main; sys.exit(main())")
COMMANDS: dict[str, tuple[str, ...]] = {
    "import torch": ("-c", "import torch"),
    "import sparc_loss": ("-c", "import sparc_loss"),
    "from sparc_loss import SparcLoss": ("-c", "from sparc_loss import SparcLoss"),
    "sparc-loss --help": (*_CLI, "--help"),
    "sparc-loss --version": (*_CLI, "--version"),
    "sparc-loss nothing": (*_CLI, "nothing"),
    "python -m sparc_loss.train --loss nothing": ("-m", "sparc_loss.train", "--loss", "nothing"),
    "python -m sparc_loss.train --loss sparc --help": ("-m", "sparc_loss.train", "--loss", "sparc", "--help"),
}
# Of what the user got wrong.
_REFUSED = ("sparc-loss nothing", "python -m sparc_loss.train --loss nothing")


def start_up(rounds: int = 5) -> list[dict[str, Any]]:
    """Seconds of each command, with quartiles; each round runs all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for round_ in range(rounds + 1):  # the first one fills the caches of the disk
        for name, arguments in COMMANDS.items():
            start = time.perf_counter()
            finished = subprocess.run([sys.executable, *arguments], capture_output=True)
            if bool(finished.returncode) != (name in _REFUSED):
                raise RuntimeError(f"{name} ended with code {finished.returncode}: {finished.stderr.decode()}")
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return [{"command": name, "seconds": statistics.quantiles(each, n=4)} for name, each in seconds.items()]


def show_start_up(results: list[dict[str, Any]]) -> None:
    """Print them."""
    print("\nHow soon a command answers")
    for each in results:
        low, middle, high = each["seconds"]
        print(f"  {each['command']:46} {middle:5.2f} s ({low:.2f} to {high:.2f})")
