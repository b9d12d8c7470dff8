"""The console script `sparc-loss`."""

import os
import sys

from sparc_loss import __version__

USAGE = """usage: sparc-loss COMMAND ...

commands:
  train      train an open_clip model with a loss plug-in; the same as python -m sparc_loss.train
  evaluate   measure an open_clip model on a CSV of images and captions, with boxes or masks where it has them
  show       draw what each word of a caption selects of an image, as a picture or a page

sparc-loss COMMAND --help lists the flags. sparc-loss --version prints the version.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command named first in `argv`; returns its exit code (2 for an unknown command)."""
    argv = sys.argv[1:] if argv is None else argv
    match argv:
        case ["train", *rest]:
            from sparc_loss import train

            return train.main(rest)
        case ["evaluate", *rest]:
            _let_waiting_threads_sleep()
            from sparc_loss.evaluation.command import main as evaluate

            return evaluate(rest)
        case ["show", *rest]:
            _let_waiting_threads_sleep()
            try:
                from sparc_loss.show.command import main as show
            except ImportError as error:
                print(f"sparc-loss show: error: {error}; pip install 'sparc-loss[show]'", file=sys.stderr)
                return 2
            return show(rest)
        case ["--version"]:
            print(f"sparc-loss {__version__}")
            return 0
        case ["-h" | "--help"]:
            print(USAGE, end="")
            return 0
    found = f"unknown command {argv[0]!r}" if argv else "no command given"
    print(f"{USAGE}\nsparc-loss: error: {found}; expected train, evaluate or show", file=sys.stderr)
    return 2


def _let_waiting_threads_sleep() -> None:
    """Unless the user says otherwise, threads of OpenMP do not spin while they wait for each other.

    Where another program needs the cores, spinning makes a model several times slower. OpenMP reads this once, when
    torch is imported.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
