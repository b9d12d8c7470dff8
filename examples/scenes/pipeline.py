"""`make train`: CLIP on generated scenes, then SPARC from there, with CLIP continued equally long as the control.

By the recipe of examples/study/, SPARC comes again: from scratch, for as many epochs as the other two take together.

Every stage is a run of `python -m sparc_loss.train`. Each call makes a folder of its own, runs/scenes-WORLD-DATE-TIME.
"""

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

from .dataset import SIZES, read_captions, write_dataset
from .evaluation_csv import write_evaluation_csv
from .model import warm_start, write_model
from .report import write_report
from .worlds import WORLDS

BATCH_SIZE = 64
# What did best in examples/study/README.md, on scenes like these.
RECIPE = ("--sparc-fine-grained-weight", "0.3", "--sparc-image-negatives", "3")
LOG_EVERY = 25


def main(argv: Sequence[str] | None = None) -> None:
    """Make the data, train the three stages, report."""
    arguments = _parse(argv)
    began = time.monotonic()
    run = arguments.runs.resolve() / f"scenes-{arguments.world}-{datetime.now():%Y%m%d-%H%M%S}"
    run.mkdir(parents=True)
    print(f"This run: {run}\n")

    data = write_dataset(run / "data", {**SIZES, "train": arguments.scenes}, world=arguments.world)
    models = run / "models"
    untrained = write_model(
        models / "untrained", read_captions(data, "train"), seed=arguments.seed, world=arguments.world
    )
    stages = {
        # column of the table: (starts from, epochs, learning rate, loss flags)
        "start": (untrained, arguments.start_epochs, 2e-3, ["--loss", "clip"]),
        "CLIP": (models / "start", arguments.epochs, 5e-4, ["--loss", "clip"]),
        "SPARC": (models / "start", arguments.epochs, 5e-4, ["--loss", "sparc"]),
        "recipe": (
            untrained,
            arguments.start_epochs + arguments.epochs,
            2e-3,
            ["--loss", "sparc", *arguments.recipe],
        ),
    }
    for name, (origin, epochs, lr, loss) in stages.items():
        flags = [*loss, "--epochs", str(epochs), "--lr", str(lr), "--seed", str(arguments.seed)]
        checkpoint = _train(name, run, data, origin, epochs, flags)
        warm_start(models / name, untrained, checkpoint)

    table = write_report(run, {name: models / name for name in stages}, data)
    minutes = (time.monotonic() - began) / 60
    print(f"\nHeld-out scenes, {minutes:.1f} minutes in all:\n\n{table}")
    print(
        f"What each word selects under CLIP and the recipe: {run / 'words.png'}; to point into: {run / 'words.html'}"
    )
    print(f"The models, for open_clip.create_model('local-dir:...'): {models}")
    print(f"The test scenes, for sparc-loss evaluate: {write_evaluation_csv(data, 'test')}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.scenes", description=__doc__)
    parser.add_argument("--world", choices=WORLDS, default="digits", help="what the scenes show (%(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="parent of the run's folder (%(default)s)")
    parser.add_argument("--scenes", type=int, default=SIZES["train"], help="training scenes (%(default)s)")
    parser.add_argument("--start-epochs", type=int, default=2, help="of CLIP from scratch (%(default)s)")
    parser.add_argument("--epochs", type=int, default=2, help="of SPARC, and of CLIP continued (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (%(default)s)")
    parser.add_argument(
        "--recipe",
        nargs=argparse.REMAINDER,
        default=RECIPE,
        help=f"last: --sparc-... flags of that stage ({' '.join(RECIPE)})",
    )
    return parser.parse_args(argv)


def _train(name: str, run: Path, data: Path, model: Path, epochs: int, flags: Sequence[str]) -> Path:
    """Train through the launcher, its log as a progress bar; returns the last checkpoint."""
    command = [
        *(sys.executable, "-m", "sparc_loss.train"),
        *("--model", f"local-dir:{model}", "--train-data", str(data / "train.csv"), "--logs", str(run / "logs")),
        *("--name", name, "--device", "cuda" if torch.cuda.is_available() else "cpu", "--workers", "1"),
        # open_clip's default is amp, which is float16 and on a CPU ten times slower.
        *(
            "--precision",
            "fp32",
            "--batch-size",
            str(BATCH_SIZE),
            "--warmup",
            "50",
            "--wd",
            "0.1",
            "--log-every-n-steps",
            str(LOG_EVERY),
        ),
        *flags,
    ]
    with (
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
        ) as process,
        tqdm(desc=f"train {name}", unit="pair") as progress,
    ):
        for line in process.stdout:
            if step := re.search(r"Train Epoch: (\d+) \[ *(\d+)/(\d+).*?((?: [A-Z]\w*oss: \S+ \S+)+)$", line.rstrip()):
                epoch, pairs, pairs_per_epoch = map(int, step.group(1, 2, 3))
                progress.total = epochs * pairs_per_epoch
                progress.set_postfix_str(re.sub(r" \(\S+\)", "", step.group(4)).strip(), refresh=False)
                progress.update(epoch * pairs_per_epoch + pairs - progress.n)
    if process.returncode:
        raise SystemExit(f"training {name} failed with code {process.returncode}: {run / 'logs' / name / 'out.log'}")
    return run / "logs" / name / "checkpoints" / f"epoch_{epochs}.pt"
