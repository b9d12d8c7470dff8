"""The figures of suites beside the published ones, and the list of suites, as text."""

from collections.abc import Mapping
from typing import Any

from sparc_loss.evaluation.markdown import markdown_table
from sparc_loss.evaluation.suites import SUITES
from sparc_loss.evaluation.suites.published import Published, published_figures, references
from sparc_loss.evaluation.titles import suite_title


def figures_table(records: Mapping[str, Any]) -> str:
    """A row per figure, in per cent; then the sources, and what was left out.

    Args:
        records: by suite, from `run`.
    """
    rows = [["suite", "figure", "model, %", "chance, %", "published, %", "images", "protocol"]]
    sources: list[str] = []
    notes = []
    for name, record in records.items():
        settings = record["settings"]
        for figure, each in record["figures"].items():
            shown = references(name, figure, settings.get("preset", ""), settings["model"], settings["pretrained"])
            rows.append(
                [
                    name,
                    suite_title(figure),
                    f"{100 * each['value']:.1f}",
                    f"{100 * each['chance']:.1f}",
                    "; ".join(_cited(one, settings, sources) for one in shown) or "none known",
                    str(each["images"]) + ("" if settings["limit"] is None else f" (--limit {settings['limit']})"),
                    record["protocol"],
                ]
            )
        notes += [f"{name}: {note}\n" for note in record["notes"]]
    text = markdown_table(rows, left=(0, 1, 4, 6))
    if sources:
        text += "\n" + "".join(f"[{number}] {source}\n" for number, source in enumerate(sources, start=1))
    return text + ("\n" + "".join(notes) if notes else "")


def list_of_suites() -> str:
    """Every suite: its files, its protocols, and the published figures of OpenAI's ViT-B/16."""
    return "\n".join(map(_described, SUITES))


def _described(name: str) -> str:
    suite = SUITES[name]
    lines = [f"{name}: {suite.title}", "  files in --data-root", *(f"    {path}" for path in suite.layout)]
    for preset, protocol in suite.protocols.items():
        lines.append(f"  --protocol {preset}: {protocol.describe()}")
        lines += _published_lines(name, preset)
    if suite.protocol:
        lines.append(f"  protocol: {suite.protocol}")
        lines += _published_lines(name, "")
    return "\n".join(lines) + "\n"


def _published_lines(name: str, preset: str) -> list[str]:
    figures = dict.fromkeys(
        each.figure for each in published_figures() if (each.suite, each.protocol) == (name, preset)
    )
    return [
        f"    {suite_title(figure)} {each.value:.1f}, {each.model} {each.pretrained}".rstrip() + f" ({each.source})"
        for figure in figures
        for each in references(name, figure, preset, "", None)
    ]


def _cited(published: Published, settings: Mapping[str, Any], sources: list[str]) -> str:
    if published.source not in sources:
        sources.append(published.source)
    same = (published.model, published.pretrained) == (settings["model"], settings["pretrained"])
    weights = "" if same else f" {published.model} {published.pretrained}".rstrip()
    return f"{published.value:.1f}{weights} [{sources.index(published.source) + 1}]"
