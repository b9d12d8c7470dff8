"""Published figures, each with its source: published.csv, in per cent."""

import csv
from functools import cache
from importlib.resources import files
from typing import NamedTuple

# Whose figures are shown where a model has none of its own.
_REFERENCE = ("ViT-B-16", "openai")


class Published(NamedTuple):
    """A published figure.

    Attributes:
        suite: as `--suite` takes it.
        figure: as the suite names it.
        model: as `--model` takes it, or what the source calls it.
        pretrained: as `--pretrained` takes it; "" where the weights are not public.
        protocol: the preset that describes it best; "" where a suite has one protocol.
        value: in per cent.
        source: where it was read.
    """

    suite: str
    figure: str
    model: str
    pretrained: str
    protocol: str
    value: float
    source: str


@cache
def published_figures() -> tuple[Published, ...]:
    """All of them, in the order of the file."""
    text = (files("sparc_loss.evaluation.suites") / "published.csv").read_text("utf-8")
    return tuple(
        Published(
            row["suite"],
            row["figure"],
            row["model"],
            row["pretrained"],
            row["protocol"],
            float(row["value"]),
            row["source"],
        )
        for row in csv.DictReader(text.splitlines())
    )


def references(suite: str, figure: str, protocol: str, model: str, pretrained: str | None) -> list[Published]:
    """The published figures to show beside one figure of a model: its own, else those of OpenAI's ViT-B/16.

    Args:
        suite: its name.
        figure: its name.
        protocol: the preset; "" where the suite has one protocol.
        model: as `--model` has it.
        pretrained: as `--pretrained` has it.
    """
    sought = (suite, figure, protocol)
    named = [each for each in published_figures() if (each.suite, each.figure, each.protocol) == sought]
    for weights in ((model, pretrained or ""), (f"{model}-quickgelu", pretrained or ""), _REFERENCE):
        found = [each for each in named if (each.model, each.pretrained) == weights]
        if found:
            return found
    return named
