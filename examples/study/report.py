"""The study's results: tables with mean and spread over seeds, a plot per measure, everything as JSON."""

import json
import platform
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from sparc_loss.evaluation.markdown import markdown_table

from ..scenes.measures import MEASURES
from .plan import PLANS, Run

# Heading of a column -> the measures whose mean it shows.
COLUMNS = {
    "R@1": ("image_to_text_recall", "text_to_image_recall"),
    "swapped": ("hard_negatives",),
    "K-Prec.": ("k_precision",),
    "colours": ("colour_word_pointing",),
    "kinds": ("kind_word_pointing",),
    "new pairs": ("new_pair_pointing",),
    "phrases": ("phrase_pointing",),
    "phr. tokens": ("phrase_tokens_pointing",),
    "mIoU": ("mean_iou",),
}
# Of a second table, whether the alignment looks at its image.
IMAGE_COLUMNS = {
    "right": ("right_images",),
    "shuffled": ("shuffled_images",),
    "constant": ("constant_images",),
    "loss, right": ("right_images_loss",),
    "loss, shuffled": ("shuffled_images_loss",),
    "loss, constant": ("constant_images_loss",),
}
TABLES = {
    ("mean", "scratch"): "From scratch, average-pooled text",
    ("mean", "warm"): "From the CLIP of the same seed, average-pooled text",
    ("last", "scratch"): "From scratch, end-of-text pooling",
    ("last", "warm"): "From the CLIP of the same seed, end-of-text pooling",
}

# Below, a range over seeds says little.
ENOUGH_SEEDS = 5
PAIRED_WITH = ("CLIP", "CLIP + FILIP")

Results = Mapping[Run, Mapping[str, Any]]


def write_report(
    folder: Path, results: Results, chosen: Mapping[str, tuple[tuple[str, Any], ...]], size: Mapping[str, Any]
) -> str:
    """Write study.json, tables.md and a plot per measure into `folder`; returns the tables."""
    tables = markdown_tables(results)
    record = {
        "machine": machine(),
        "size": dict(size),
        "chosen": {family: dict(settings) for family, settings in chosen.items()},
        "runs": [
            {
                "variant": run.variant,
                "start": run.start,
                "pooling": run.pooling,
                "seed": run.seed,
                "settings": dict(run.settings),
                **result,
            }
            for run, result in results.items()
        ],
    }
    compact = json.dumps(_five_digits(record), separators=(",", ":"))
    (folder / "study.json").write_text(compact + "\n", encoding="utf-8")
    (folder / "tables.md").write_text(tables, encoding="utf-8")
    for measure in MEASURES:
        if all(measure in result["test"] for result in results.values()):
            draw(measure, results, folder / f"{measure}.png")
    return tables


def machine() -> dict[str, str]:
    """What the figures were made with."""
    return {"processor": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}


def _five_digits(value: Any) -> Any:
    """Numbers rounded to five digits, in lists and dictionaries."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {name: _five_digits(each) for name, each in value.items()}
    return [_five_digits(each) for each in value] if isinstance(value, (list, tuple)) else value


def markdown_tables(results: Results) -> str:
    """Two tables per start and pooling; after the variants, chance and ceiling."""
    parts = []
    for (pooling, start), title in TABLES.items():
        rows = by_variant(results, pooling, start)
        if not rows:
            continue
        seeds = len(next(iter(rows.values())))
        parts.append(f"### {title} ({seeds} seeds)\n\n{_table(rows, COLUMNS)}")
        parts.append(f"How often a token finds its group, and the fine-grained loss:\n\n{_table(rows, IMAGE_COLUMNS)}")
        for name in PAIRED_WITH if seeds >= ENOUGH_SEEDS else ():
            if name in rows:
                heading = f"Difference from {name} of the same seed, mean and range over the seeds:"
                parts.append(f"{heading}\n\n{_differences(rows, name)}")
    return "\n".join(parts)


def _differences(rows: Mapping[str, list[Mapping[str, Any]]], reference: str) -> str:
    columns = _measured(COLUMNS, rows)
    table = [["", *columns]]
    for name, runs in rows.items():
        if name == reference:
            continue
        cells = []
        for measures in columns.values():
            pairs = zip(column_values(runs, measures), column_values(rows[reference], measures), strict=True)
            differences = [ours - theirs for ours, theirs in pairs]
            middle, low, high = (_signed(each(differences)) for each in (statistics.fmean, min, max))
            cells.append(f"{middle} ({low} to {high})")
        table.append([name, *cells])
    return markdown_table(table)


def _measured(
    columns: Mapping[str, tuple[str, ...]], rows: Mapping[str, list[Mapping[str, Any]]]
) -> dict[str, tuple[str, ...]]:
    """The columns that this world has."""
    measured = next(iter(rows.values()))[0]["test"]
    return {heading: measures for heading, measures in columns.items() if set(measures) <= measured.keys()}


def _signed(value: float) -> str:
    """Such as "+.03"; "-.00" is "+.00"."""
    return f"{round(value, 2) + 0.0:+.2f}".replace("0.", ".", 1)


def by_variant(results: Results, pooling: str, start: str) -> dict[str, list[Mapping[str, Any]]]:
    """Variant -> its results in the order of the seeds."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    order = [name for plan in PLANS.values() for name in plan]
    chosen = [run for run in results if (run.pooling, run.start) == (pooling, start)]
    for run in sorted(chosen, key=lambda run: (order.index(run.variant), run.seed)):
        rows.setdefault(run.variant, []).append(results[run])
    return rows


def column_values(runs: Iterable[Mapping[str, Any]], names: tuple[str, ...]) -> list[float]:
    """A column's figure for each run, on the test split."""
    return [statistics.fmean(run["test"][name] for name in names) for run in runs]


def spread(values: list[float]) -> str:
    """Mean and standard deviation: ".31 ± .02"."""
    if len(values) == 1:
        return _short(values[0])
    return f"{_short(statistics.fmean(values))} ± {_short(statistics.stdev(values))}"


def draw(measure: str, results: Results, path: Path) -> None:
    """A panel per start and pooling: a dot per seed, a bar at the mean, chance and ceiling as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = {title: rows for key, title in TABLES.items() if (rows := by_variant(results, *key))}
    heights = [len(rows) + 1 for rows in panels.values()]
    figure, axes = plt.subplots(
        len(panels),
        figsize=(7, 0.32 * sum(heights) + 1.2),
        sharex=True,
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )
    for axis, (title, rows) in zip(axes[:, 0], panels.items(), strict=True):
        level = next(iter(rows.values()))[0]["levels"][measure]
        axis.axvline(level["chance"], color="grey", linestyle=":", label="chance")
        axis.axvline(level["ceiling"], color="grey", linestyle="--", label="ceiling")
        for place, runs in enumerate(rows.values()):
            values = column_values(runs, (measure,))
            axis.plot([statistics.fmean(values)], [place], marker="|", markersize=12, color="black")
            axis.plot(values, [place] * len(values), marker="o", linestyle="", markersize=4, alpha=0.7, color="C0")
        axis.set_yticks(range(len(rows)), list(rows))
        axis.invert_yaxis()
        axis.set_title(title, fontsize="medium")
    handles, labels = axes[-1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")
    figure.suptitle(MEASURES[measure])
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _table(rows: Mapping[str, list[Mapping[str, Any]]], columns: Mapping[str, tuple[str, ...]]) -> str:
    columns = _measured(columns, rows)
    cells = [["", *columns]]
    for variant, runs in rows.items():
        cells.append([variant, *(spread(column_values(runs, names)) for names in columns.values())])
    levels = next(iter(rows.values()))[0]["levels"]
    for level in ("chance", "ceiling"):
        figures = [statistics.fmean(levels[name][level] for name in names) for names in columns.values()]
        cells.append([level, *(_short(figure) for figure in figures)])
    return markdown_table(cells)


def _short(figure: float) -> str:
    """Two digits, without the zero before the point."""
    text = f"{figure:.2f}"
    return text[1:] if text.startswith("0") else text
