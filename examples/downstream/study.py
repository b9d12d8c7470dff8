"""`make downstream`: what the backbones of the study are good for, in detection and captioning.

Each backbone with each seed is a run of `python -m examples.detection`, frozen and fine-tuned, and of `python -m
examples.captioning`. What is there is not done again, so a study that was stopped goes on where it was. Backbones that
`make study` has not trained yet are trained first, with the settings that it chose.
"""

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tqdm import tqdm

from sparc_loss.evaluation.command import write_json
from sparc_loss.evaluation.markdown import markdown_table

from ..captioning.command import main as captioning
from ..detection.command import main as detection
from ..processes import process_pool
from ..study.plan import SIZES, Run, Size, file_name, final_runs
from ..study.report import machine
from ..study.study import prepare, read_settings, run_all
from ..study.training import Folders
from .scenes import write_downstream_data

COMMANDS: dict[str, Callable[[Sequence[str]], Any]] = {"detection": detection, "captioning": captioning}
# Row -> the plan of the study that has it. FILIP is the best rival there.
BACKBONES = {
    "CLIP": "recipe",
    "SPARC": "image",
    "CLIP + FILIP": "recipe",
    "SPARC + 3, highest patches": "recipe",
}
# A row for control: the model before any training.
UNTRAINED = "untrained"
SEEDS = 3
STEPS = {
    "cpu": {"detection": 300, "captioning": 150},
    "gpu": {"detection": 5_000, "captioning": 5_000},
    "gpu-short": {"detection": 300, "captioning": 150},
    "tiny": {"detection": 2, "captioning": 2},
}
LEARNING_RATES = {"detection": 5e-3, "captioning": 2e-3}
_COMMITTED = Path(__file__).parents[1] / "study" / "results"


@dataclass(frozen=True)
class Task:
    """A table: a command with flags, and its measures under their headings."""

    title: str
    command: str
    flags: tuple[str, ...]
    columns: Mapping[str, str]

    @property
    def name(self) -> str:
        """Of its files."""
        return "-".join([self.command, *(flag.strip("-") for flag in self.flags)])


_OF_DETECTION = {
    "mAP": "mAP",
    "mAP, IoU .5": "mAP at IoU 0.5",
    "names with boxes": "mAP of names with boxes in training",
    "names without": "mAP of names without",
}
TASKS = (
    Task("Detection, frozen backbone", "detection", (), _OF_DETECTION),
    Task("Detection, image tower fine-tuned", "detection", ("--fine-tune",), _OF_DETECTION),
    Task(
        "Captioning, frozen backbone",
        "captioning",
        (),
        {
            "CIDEr, greedy": "CIDEr, greedy",
            "CIDEr, beams": "CIDEr, beams",
            "of other images": "CIDEr of other images, beams",
            "K-Prec., greedy": "K-Precision, nouns and adjectives, greedy",
            "K-Prec., beams": "K-Precision, nouns and adjectives, beams",
        },
    ),
)


@dataclass(frozen=True)
class Job:
    """A run of a command."""

    task: Task
    row: str
    seed: int
    flags: tuple[str, ...]
    output: Path


Records = Sequence[tuple[Job, Mapping[str, Any]]]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing and write the tables."""
    arguments = _parse(argv)
    size = SIZES[arguments.size]
    if size.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--size {arguments.size} needs a GPU that torch can use; none is found")
    folders = Folders((arguments.output or Path("runs") / f"study-{arguments.size}").resolve())
    workers = arguments.workers or (os.cpu_count() if size.device == "cpu" else 1) or 1
    prepare(folders, size)
    backbones = _backbones(folders, arguments.seeds)
    run_all(backbones, size, folders, workers)

    report = folders.root / "downstream"
    data = report / "data"
    if not data.exists():
        report.mkdir(exist_ok=True)
        write_downstream_data(data, folders.data)
    jobs = _jobs(folders, backbones, arguments.seeds, arguments.size)
    _run(jobs, workers)
    records = [(job, json.loads(job.output.read_text(encoding="utf-8"))) for job in jobs]
    tables = markdown_tables(records)
    (report / "tables.md").write_text(tables, encoding="utf-8")
    (report / "downstream.json").write_text(json.dumps(summary(records, size), indent=1) + "\n", encoding="utf-8")
    print(f"{tables}\nWritten to {report}: downstream.json and tables.md")


def markdown_tables(records: Records) -> str:
    """A table per task: a row per backbone, mean and standard deviation over the seeds."""
    parts = []
    for task in TASKS:
        rows: dict[str, list[Mapping[str, float | None]]] = {}
        for job, record in records:
            if job.task == task:
                rows.setdefault(job.row, []).append(record["measures"])
        seeds = len(next(iter(rows.values())))
        cells = [["", *task.columns]]
        for row, runs in rows.items():
            cells.append([row, *(_spread([run[name] for run in runs]) for name in task.columns.values())])
        parts.append(f"### {task.title} ({seeds} {'seeds' if seeds > 1 else 'seed'})\n\n{markdown_table(cells)}")
    return "\n".join(parts)


def _spread(figures: Sequence[float | None]) -> str:
    """Mean and standard deviation in three digits, as far as there are figures."""
    known = [figure for figure in figures if figure is not None]
    if not known:
        return "-"
    mean = f"{statistics.fmean(known):.3f}"
    return f"{mean} ± {statistics.stdev(known):.3f}" if len(known) > 1 else mean


def summary(records: Records, size: Size) -> dict[str, Any]:
    """What is written as JSON: the machine, and the figures and the seconds of every run."""
    runs = [
        {
            "task": job.task.name,
            "backbone": job.row,
            "seed": job.seed,
            **{name: record[name] for name in ("seconds", "measures")},
        }
        for job, record in records
    ]
    return {"machine": machine(), "device": size.device, "runs": runs}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.downstream", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, choices=range(1, SEEDS + 1), default=SEEDS, help="(%(default)s)")
    parser.add_argument(
        "--size", choices=SIZES, default="cpu", help="of the study; %(default)s takes up to 60 minutes on 2 cores"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="of the study (runs/study-SIZE)")
    parser.add_argument("--workers", type=int, metavar="N", help="runs at a time (one per core; one on a GPU)")
    return parser.parse_args(argv)


def _backbones(folders: Folders, seeds: int) -> list[Run]:
    """The runs of the study, by the settings that it chose in this folder, else by those of the committed results."""
    found = []
    for row, plan in BACKBONES.items():
        own = folders.root / plan / "study.json"
        path = own if own.exists() else _COMMITTED / plan / "study.json"
        runs = final_runs(read_settings(path), plan, seeds)
        found += [run for run in runs if (run.variant, run.start, run.pooling) == (row, "scratch", "mean")]
    return found


def _jobs(folders: Folders, backbones: Sequence[Run], seeds: int, size: str) -> list[Job]:
    data = folders.root / "downstream" / "data"
    data_of = {
        "detection": {"train-data": data / "detection-train.csv"},
        "captioning": {
            "train-data": folders.data / "train.csv",
            "nouns-and-adjectives": data / "nouns-and-adjectives.txt",
        },
    }
    weights: dict[tuple[str, int], dict[str, object]] = {(UNTRAINED, seed): {} for seed in range(seeds)}
    weights |= {(run.variant, run.seed): {"pretrained": folders.weights(run)} for run in backbones}
    jobs = []
    for task in TASKS:
        for (row, seed), pretrained in weights.items():
            output = folders.root / "downstream" / f"{task.name}-{file_name(row)}-seed{seed}.json"
            values = {
                "model": f"local-dir:{folders.model('mean', seed)}",
                **pretrained,
                **data_of[task.command],
                "test-data": data / "test.csv",
                "steps": STEPS[size][task.command],
                "lr": LEARNING_RATES[task.command],
                "seed": seed,
                "workers": 0,
                "device": SIZES[size].device,
            }
            flags = tuple(part for name, value in values.items() for part in (f"--{name}", str(value)))
            jobs.append(Job(task, row, seed, flags + task.flags, output))
    return jobs


def _run(jobs: Sequence[Job], workers: int) -> None:
    """Run the jobs whose figures are not there, or are of other flags; each takes one thread."""
    # The longest first, so that no core waits long at the end.
    missing = [job for job in reversed(jobs) if not _is_done(job)]
    # Of the processes only: theirs would be drawn over the one below.
    with patch.dict(os.environ, TQDM_DISABLE="1"), tqdm(desc="runs", total=len(missing), unit="run") as progress:
        if not missing:
            return
        with process_pool(min(workers, len(missing))) as pool:
            for name in pool.imap_unordered(_run_one, missing):
                progress.update()
                progress.set_postfix_str(name)


def _run_one(job: Job) -> str:
    began = time.monotonic()
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        measures = COMMANDS[job.task.command](job.flags)
    write_json(job.output, {"flags": job.flags, "seconds": time.monotonic() - began, "measures": measures})
    return job.output.stem


def _is_done(job: Job) -> bool:
    if not job.output.exists():
        return False
    return json.loads(job.output.read_text(encoding="utf-8")).get("flags") == list(job.flags)
