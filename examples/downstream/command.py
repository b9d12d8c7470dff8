"""What the commands `examples.detection` and `examples.captioning` share: flags, checks, errors in one line, JSON."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sparc_loss import __version__
from sparc_loss._checks import check_number
from sparc_loss._files import check_output
from sparc_loss.evaluation.command import write_json
from sparc_loss.model_loading import add_model_flags, complete_from_run

Measures = dict[str, float | int | None]


def make_parser(prog: str, description: str | None, steps: int, learning_rate: float) -> ArgumentParser:
    """The flags of both commands."""
    parser = ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    add_model_flags(parser)
    add = parser.add_argument
    data = "a CSV as `sparc-loss evaluate` reads it"
    add("--train-data", required=True, metavar="FILE.csv", help=f"{data}; the head is trained on it")
    add("--test-data", required=True, metavar="FILE.csv", help=f"{data}; the figures are of it")
    add("--output", metavar="FILE.json", help="write the figures there")
    add("--steps", type=int, default=steps, metavar="N", help="of training (default: %(default)s)")
    add("--batch-size", type=int, default=64, metavar="N", help="default: %(default)s")
    add("--lr", type=float, default=learning_rate, metavar="X", help="of the head (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the head and of the batches (default: %(default)s)")
    add("--workers", type=int, default=2, metavar="N", help="processes that read images (default: %(default)s)")
    add("--device", metavar="NAME", help="default: cuda where there is one, else cpu")
    return parser


def run_command(parser: ArgumentParser, argv: Sequence[str] | None, work: Callable[[Namespace], Measures]) -> Measures:
    """Parse, check, work, print the figures and write them; what the user got wrong is one line and exit code 2."""
    args = parser.parse_args(argv)
    try:
        _check(args)
        args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        args.precision = "fp32"
        complete_from_run(parser.prog, args)
        measures = work(args)
        for name, value in measures.items():
            print(f"{name:<36} {'-' if value is None else value if isinstance(value, int) else f'{value:.3f}'}")
        if args.output:
            arguments = {name: value for name, value in vars(args).items() if name != "output"}
            record = {"sparc_loss": __version__, "arguments": arguments, "measures": measures}
            write_json(Path(args.output), record)
    except (OSError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted; nothing is kept", file=sys.stderr)
        raise SystemExit(130) from None
    return measures


def training_settings(args: Namespace) -> dict[str, Any]:
    """The flags that the training of every head takes, as keyword arguments."""
    return {name: getattr(args, name) for name in ("steps", "batch_size", "lr", "seed", "workers")}


def _check(args: Namespace) -> None:
    for name, minimum in (("steps", 1), ("batch_size", 1), ("workers", 0), ("lr", 0)):
        check_number(f"argument --{name.replace('_', '-')}", getattr(args, name), minimum, float("inf"))
    if args.output:
        check_output(Path(args.output), args.train_data, args.test_data, args.pretrained)
