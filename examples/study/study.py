"""`make study`: choose settings on the validation split, train every row of the tables, write them.

Everything is kept in one folder. What is there is not done again, so a study that was stopped goes on where it was.
Each run takes one thread, as many runs at a time as there are cores, so the figures do not depend on their number.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..processes import process_pool
from ..scenes.dataset import read_captions, read_world, write_dataset
from ..scenes.model import CONFIG, write_model
from ..scenes.world import Split
from ..scenes.worlds import WORLDS
from .plan import PLANS, SEEDS, SIZES, TUNING_SEED, Run, Size, clip_run, final_runs, tuning_runs
from .report import write_report
from .training import Folders, execute

# What the settings are chosen by: the mean of these on the validation split.
CHOSEN_BY = (
    "image_to_text_recall",
    "text_to_image_recall",
    "colour_word_pointing",
    "kind_word_pointing",
    "phrase_pointing",
    "mean_iou",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing of the study and write its report."""
    arguments = _parse(argv)
    size = SIZES[arguments.size]
    size = replace(size, scratch_steps=size.scratch_steps * WORLDS[arguments.world].patience)
    if size.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--size {arguments.size} needs a GPU that torch can use; none is found")
    folders = Folders((arguments.output or _default_folder(arguments.world, arguments.size)).resolve())
    prepare(folders, size, arguments.world)

    workers = arguments.workers or (os.cpu_count() if size.device == "cpu" else 1)
    if arguments.settings_of:
        chosen = read_settings(arguments.settings_of)
    else:
        tuning = [clip_run("mean", TUNING_SEED), *tuning_runs(arguments.plan)]
        chosen = choose_settings(run_all(tuning, size, folders, workers))
    results = run_all(final_runs(chosen, arguments.plan, arguments.seeds), size, folders, workers)
    report = folders.root / arguments.plan
    report.mkdir(exist_ok=True)
    print(write_report(report, results, chosen, asdict(size)))
    print(f"Written to {report}: study.json, tables.md and a plot per measure")


def prepare(folders: Folders, size: Size, world: str = "digits") -> None:
    """The scenes and the untrained models, unless they are there.

    Raises:
        SystemExit: those that are there are of another size or world.
    """
    folders.root.mkdir(parents=True, exist_ok=True)
    scenes: dict[Split, int] = {"train": size.scenes, "val": size.held_out, "test": size.held_out}
    if not folders.data.exists():
        write_dataset(folders.data, scenes, world=world)
    _check_found(folders.data, "scenes of the world", read_world(folders.data), world)
    for split, number in scenes.items():
        _check_found(folders.data, f"{split} scenes", len(read_captions(folders.data, split)), number)
    captions = read_captions(folders.data, "train")
    for pooling in ("mean", "last"):
        for seed in (*max(SEEDS.values(), key=len), TUNING_SEED):
            folder = folders.model(pooling, seed)
            if not folder.exists():
                write_model(
                    folder,
                    captions,
                    seed,
                    pooling=pooling,
                    width=size.width,
                    vision_layers=size.vision_layers,
                    world=world,
                )
            vision = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model_cfg"]["vision_cfg"]
            _check_found(folder, "width", vision["width"], size.width)
            _check_found(folder, "vision layers", vision["layers"], size.vision_layers)


def run_all(runs: Sequence[Run], size: Size, folders: Folders, workers: int) -> dict[Run, dict[str, Any]]:
    """The results of the runs, trained where they are not there yet; warm starts after what they start from."""
    results = {run: result for run in runs if (result := _read(run, size, folders)) is not None}
    missing = [run for run in runs if run not in results]
    with tqdm(desc="steps", total=sum(_weight(run, size) for run in missing), unit="step") as progress:
        for stage in ([run for run in missing if run.origin is None], [run for run in missing if run.origin]):
            for run, result in _in_processes(stage, size, folders, workers):
                results[run] = result
                progress.update(_weight(run, size))
                progress.set_postfix_str(run.name)
    return {run: results[run] for run in runs}


def choose_settings(results: Mapping[Run, Mapping[str, Any]]) -> dict[str, tuple[tuple[str, Any], ...]]:
    """Family -> its best settings by the mean of CHOSEN_BY on the validation split, as far as the world has them."""
    chosen = {}
    for family in dict.fromkeys(run.family for run in results if run.variant.startswith("tune")):
        tried = {run.settings: result["val"] for run, result in results.items() if run.variant == f"tune {family}"}
        chosen[family] = max(tried, key=lambda settings: sum(tried[settings].get(name, 0) for name in CHOSEN_BY))
    return chosen


def read_settings(path: Path) -> dict[str, tuple[tuple[str, Any], ...]]:
    """Family -> the settings that another study chose, from its study.json."""
    chosen = json.loads(path.read_text(encoding="utf-8"))["chosen"]
    return {family: tuple(settings.items()) for family, settings in chosen.items()}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--plan",
        choices=PLANS,
        default="objectives",
        help="the objectives like for like, what makes SPARC look at its image, the recipe, or what was tried on the "
        "way to it (%(default)s)",
    )
    parser.add_argument("--world", choices=WORLDS, default="digits", help="what the scenes show (%(default)s)")
    parser.add_argument("--seeds", type=int, metavar="N", help="only the first N seeds of the plan")
    parser.add_argument(
        "--settings-of",
        type=Path,
        metavar="FILE",
        help="the study.json of another study, whose settings to take in place of choosing",
    )
    parser.add_argument("--size", choices=SIZES, default="cpu", help="%(default)s takes about 80 minutes on 2 cores")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="runs/study-SIZE, or runs/study-WORLD-SIZE")
    parser.add_argument("--workers", type=int, metavar="N", help="runs at a time (one per core; one on a GPU)")
    return parser.parse_args(argv)


def _default_folder(world: str, size: str) -> Path:
    return Path("runs") / (f"study-{size}" if world == "digits" else f"study-{world}-{size}")


def _check_found(folder: Path, what: str, found: int | str, expected: int | str) -> None:
    if found != expected:
        raise SystemExit(f"{folder} has {what}: {found}; expected {expected}, or another --output")


def _read(run: Run, size: Size, folders: Folders) -> dict[str, Any] | None:
    """A finished run's result; None if there is none, or one of other settings."""
    path = folders.result(run)
    if not path.exists() or (run.is_origin and not folders.weights(run).exists()):
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return record["result"] if record["run"] == _description(run, size) else None


def _write(run: Run, size: Size, folders: Folders, result: dict[str, Any]) -> None:
    path = folders.result(run)
    path.parent.mkdir(exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps({"run": _description(run, size), "result": result}, indent=1), encoding="utf-8")
    draft.replace(path)


def _description(run: Run, size: Size) -> dict[str, Any]:
    """The run and the size, as JSON gives them back. Who changes code or constants takes another folder."""
    return json.loads(json.dumps({**asdict(run), **asdict(size)}))


def _weight(run: Run, size: Size) -> int:
    return round(size.steps(run) * run.cost)


def _in_processes(
    runs: Sequence[Run], size: Size, folders: Folders, workers: int
) -> Iterator[tuple[Run, dict[str, Any]]]:
    longest_first = sorted(runs, key=lambda run: -_weight(run, size))
    jobs = [(run, size, folders) for run in longest_first]
    if not jobs:
        return
    with process_pool(min(workers, len(jobs))) as pool:
        yield from pool.imap_unordered(_run_and_write, jobs)


def _run_and_write(job: tuple[Run, Size, Folders]) -> tuple[Run, dict[str, Any]]:
    run, size, folders = job
    began = time.monotonic()
    result = execute(run, size, folders)
    result["seconds"] = time.monotonic() - began
    _write(run, size, folders, result)
    return run, result
