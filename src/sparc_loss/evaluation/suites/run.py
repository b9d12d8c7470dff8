"""Measure a model on suites: read and check all data first, keep each suite's figures as soon as they are known."""

import json
import platform
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sparc_loss import __version__
from sparc_loss.evaluation.dataset import EvaluationData, read_lines
from sparc_loss.evaluation.protocol import PROTOCOL_FIELDS, Protocol
from sparc_loss.evaluation.suites import SUITES
from sparc_loss.evaluation.suites.suite import DataFolder, Suite, split_names
from sparc_loss.model_loading import MODEL_SETTINGS

if TYPE_CHECKING:
    from torch import nn

    from sparc_loss.evaluation.evaluate import Options


class Task(NamedTuple):
    """A suite to be measured.

    Attributes:
        suite: which.
        protocol: of segmentation in windows; None for other measures.
        settings: everything that the figures depend on; figures with the same settings are not measured again.
        data: by part; empty where the figures are known.
        notes: what was left out, one line each.
    """

    suite: Suite
    protocol: Protocol | None
    settings: dict[str, Any]
    data: Mapping[str, EvaluationData]
    notes: list[str]


def plan(args: Namespace, known: Mapping[str, Any], templates: list[str] | None) -> list[Task]:
    """Read and check the data of all suites whose figures are not known.

    Args:
        args: of the command.
        known: records by suite, of an earlier run.
        templates: prompts that replace the protocols'.

    Raises:
        ValueError: an unknown suite, a flag that no suite uses, a wrong value; DataError for data.
    """
    suites = [_suite(name) for name in args.suite.split(",")]
    changes = {name: getattr(args, name) for name in PROTOCOL_FIELDS if getattr(args, name) is not None}
    if "ignored_values" in changes:
        changes["ignored_values"] = tuple(changes["ignored_values"])
    if args.classes:
        changes["classes"] = split_names(read_lines(args.classes))
    if templates is not None:
        changes["templates"] = tuple(templates)
    _check_used(args, suites, changes)
    args.protocol = args.protocol or "plain"
    root = Path(args.data_root)
    if not root.is_dir():
        raise ValueError(
            f"argument --data-root: {args.data_root!r} is no folder; expected the folder of the data sets"
        )
    tasks = []
    for suite in suites:
        protocol = _protocol(suite, args.protocol, changes)
        folder = DataFolder(root, suite, args.skip_missing)
        data = {part: _prepared(each, args.limit, protocol) for part, each in suite.read(folder).items()}
        settings = _settings(args, suite, protocol, templates, data)
        is_known = suite.name in known and known[suite.name].get("settings") == settings
        notes = [*folder.notes, *(note for each in data.values() for note in each.notes)]
        if protocol is not None and protocol != suite.protocols[args.protocol]:
            notes.append(f"the protocol differs from {args.protocol}, with which the published figures were taken")
        if protocol is not None and not is_known:
            from sparc_loss.evaluation.evaluate_windows import check_masks

            for each in data.values():
                check_masks(each)
        tasks.append(Task(suite, protocol, settings, {} if is_known else data, notes))
    return tasks


def run(
    tasks: list[Task],
    known: Mapping[str, Any],
    model: "nn.Module",
    tokenizer: Any,
    options: "Options",
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """The records of all tasks, by suite.

    Args:
        tasks: from `plan`.
        known: records by suite, of an earlier run.
        model: surfaced.
        tokenizer: the model's own.
        options: how to measure.
        keep: called with the records so far whenever a suite is done.
    """
    _check_towers(tasks, model)
    records: dict[str, Any] = {}
    for task in tasks:
        name = task.suite.name
        if not task.data:
            print(f"{name}: known from an earlier run", file=sys.stderr)
            records[name] = known[name]
            continue
        print(f"{name}: {task.suite.title}", file=sys.stderr)
        records[name] = _measure(task, model, tokenizer, options)
        keep(records)
    return records


def read_known(path: Path | None) -> dict[str, Any]:
    """The records of an earlier run in its JSON, by suite; empty where there is no such file."""
    if path is None or not path.is_file():
        return {}
    try:
        suites = json.loads(path.read_text(encoding="utf-8"))["suites"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # of another command: it is written anew, as ever
    return suites if isinstance(suites, dict) else {}


def _suite(name: str) -> Suite:
    if name not in SUITES:
        raise ValueError(f"argument --suite: {name!r} is no suite; expected of {', '.join(SUITES)}, by commas")
    return SUITES[name]


def _check_used(args: Namespace, suites: list[Suite], changes: Mapping[str, Any]) -> None:
    """Refuse a flag that would change nothing."""
    families = {family for suite in suites for family in suite.families}
    if args.nouns_and_adjectives and "faithfulness" not in families:
        raise ValueError("argument --nouns-and-adjectives: given, but none of the suites has K-Precision")
    if any(suite.protocols for suite in suites):
        return
    if args.protocol:
        raise ValueError("argument --protocol: given, but none of the suites is of segmentation")
    for name in changes:
        if name == "templates":
            if "classification" not in families:
                raise ValueError("argument --templates: given, but none of the suites has classes")
        elif not (name == "reading" and "pointing" in families):
            raise ValueError(f"argument --{name.replace('_', '-')}: given, but none of the suites is of segmentation")


def _protocol(suite: Suite, preset: str, changes: Mapping[str, Any]) -> Protocol | None:
    if not suite.protocols:
        return None
    protocol = suite.protocols[preset]
    given, expected = len(changes.get("classes", protocol.classes)), len(protocol.classes)
    if given != expected:
        raise ValueError(f"argument --classes: {given} lines; {suite.name} has {expected} classes")
    return replace(protocol, **changes)


def _prepared(data: EvaluationData, limit: int | None, protocol: Protocol | None) -> EvaluationData:
    if protocol is not None and protocol.ignored_values is not None:
        data.mask_coding = replace(data.mask_coding, ignored=protocol.ignored_values)
    return data if limit is None else data.first(limit)


def _settings(
    args: Namespace,
    suite: Suite,
    protocol: Protocol | None,
    templates: list[str] | None,
    data: Mapping[str, EvaluationData],
) -> dict[str, Any]:
    """Everything that the figures of a suite depend on, as JSON has it."""
    settings: dict[str, Any] = {name: getattr(args, name) for name in MODEL_SETTINGS}
    settings |= {"pretrained": args.pretrained, "precision": args.precision, "limit": args.limit}
    settings["skip_missing"] = args.skip_missing
    settings["data_root"] = str(Path(args.data_root).resolve())
    settings["images"] = {part: len(each.images) for part, each in data.items()}
    settings["weights"] = _states_of_files(args)
    if protocol is not None:
        settings["protocol"] = protocol.record()
        if protocol.templates is None:
            settings["protocol"]["templates"] = _openai_templates()
        settings["preset"] = args.protocol
    else:
        if "classification" in suite.families:
            settings["templates"] = templates or _openai_templates()
        if "pointing" in suite.families:
            settings["reading"] = args.reading or "last"
            settings["tokens"] = args.sparc_tokens or "words"
        if "faithfulness" in suite.families:
            nouns = args.nouns_and_adjectives
            settings["nouns_and_adjectives"] = read_lines(nouns) if nouns else None
    settings["versions"] = {
        "sparc_loss": __version__,
        "python": platform.python_version(),
        # Of the modules themselves: a checkout may come before an installed release.
        **{name: import_module(name).__version__ for name in ("torch", "torchvision", "timm", "open_clip", "PIL")},
    }
    return json.loads(json.dumps(settings))


def _states_of_files(args: Namespace) -> dict[str, dict[str, float]]:
    """Of the checkpoint and of the folder of a model of one's own: whole path -> size and time of change."""
    files = [Path(args.pretrained).expanduser()] if args.pretrained else []
    if args.model.startswith("local-dir:"):
        files += sorted(Path(args.model.removeprefix("local-dir:")).expanduser().glob("*"))
    states = {str(path.resolve()): path.stat() for path in files if path.is_file()}
    return {path: {"bytes": state.st_size, "modified": state.st_mtime} for path, state in states.items()}


def _openai_templates() -> list[str]:
    import open_clip

    return [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]


def _check_towers(tasks: list[Task], model: Any) -> None:
    """Refuse a reading or a window that the tower does not take, before anything is measured."""
    from sparc_loss.embeddings.readings import check_reading
    from sparc_loss.evaluation.evaluate_windows import check_tower

    for task in tasks:
        if task.protocol is not None:
            check_tower(model.visual, task.protocol)
        else:
            check_reading(model.visual, task.settings.get("reading", "last"))


def _measure(task: Task, model: "nn.Module", tokenizer: Any, options: "Options") -> dict[str, Any]:
    from sparc_loss.evaluation.evaluate import evaluate
    from sparc_loss.evaluation.evaluate_windows import evaluate_windows

    started = time.perf_counter()
    figures: dict[str, dict[str, Any]] = {}
    record: dict[str, Any] = {}
    for part, data in task.data.items():
        if task.protocol is not None:
            measure, record["iou_of_classes"] = evaluate_windows(model, tokenizer, data, task.protocol, options)
            measures = [measure]
        else:
            reading = task.settings.get("reading", "last")
            wanted = replace(options, families=task.suite.families, reading=reading)
            measures, _ = evaluate(model, tokenizer, data, wanted)
        for each in measures:
            figures[f"{part}/{each.name}" if part else each.name] = {
                "value": each.value,
                "chance": each.chance,
                "count": each.count,
                "images": len(data.images),
            }
    return {
        "title": task.suite.title,
        "protocol": task.protocol.describe() if task.protocol is not None else task.suite.protocol,
        "figures": figures,
        **record,
        "notes": task.notes,
        "seconds": round(time.perf_counter() - started, 1),
        "settings": task.settings,
    }
