"""A world of handwritten digits and drawn shapes in eight colours. The digits are scikit-learn's, written by hand."""

import math
from collections.abc import Callable
from functools import cache, partial
from itertools import product

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits

from .captions import phrase
from .world import Group, Split, World

COLOURS = {
    "red": (225, 30, 35),
    "orange": (250, 140, 20),
    "yellow": (250, 235, 40),
    "green": (30, 165, 50),
    "cyan": (50, 225, 235),
    "blue": (35, 70, 230),
    "purple": (165, 50, 200),
    "white": (252, 252, 252),
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
KINDS = DIGITS + SHAPES

_OBJECTS = (2, 5)
_DRAWING_SIZE = 96
# Glyphs 0-65 % of each digit, in the order of the data set, are for training, 65-82 % for val, the rest for test.
# That order goes writer by writer, so that most hands of the held-out splits are new.
_GLYPH_SHARES: dict[Split, tuple[float, float]] = {"train": (0.0, 0.65), "val": (0.65, 0.82), "test": (0.82, 1.0)}


@cache
def glyphs(split: Split) -> dict[str, np.ndarray]:
    """The handwritten digits of a split: name -> ink, float32 [n, 8, 8] in [0, 1]."""
    digits = load_digits()
    start, stop = _GLYPH_SHARES[split]
    chosen = {}
    for digit, name in enumerate(DIGITS):
        ink = (digits.images[digits.target == digit] / 16).astype(np.float32)
        chosen[name] = ink[round(start * len(ink)) : round(stop * len(ink))]
    return chosen


def _choose(split: Split, index: int, rng: np.random.Generator) -> list[Group]:
    """Kinds and colours may return, a pair of both may not."""
    count = rng.integers(_OBJECTS[0], _OBJECTS[1] + 1)
    pairs = rng.choice(len(KINDS) * len(COLOURS), count, replace=False)
    return [Group(KINDS[pair // len(COLOURS)], list(COLOURS)[pair % len(COLOURS)]) for pair in pairs.tolist()]


def _draw(group: Group, side: int, split: Split, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    opacity = _stencil(group.kind, side, split, rng)
    return opacity, np.asarray(COLOURS[group.colour]) + rng.uniform(-12, 12, 3)


def _stencil(kind: str, side: int, split: Split, rng: np.random.Generator) -> np.ndarray:
    """How much an object covers each pixel of its square, float32 [side, side] in [0, 1]."""
    if kind in DIGITS:
        candidates = glyphs(split)[kind]
        ink = Image.fromarray(candidates[rng.integers(len(candidates))])
        # Ink is blurred by the 8 x 8 raster; a steeper edge gives a stroke of even colour.
        opacity = np.asarray(ink.resize((side, side), Image.Resampling.BICUBIC)) * 1.6 - 0.2
        return np.clip(opacity, 0, 1)
    drawing = _drawing(kind).rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR)
    return np.asarray(drawing.resize((side, side), Image.Resampling.BOX), np.float32) / 255


@cache
def _drawing(shape: str) -> Image.Image:
    picture = Image.new("L", (_DRAWING_SIZE, _DRAWING_SIZE))
    _DRAW[shape](ImageDraw.Draw(picture))
    return picture


def _polygon(draw: ImageDraw.ImageDraw, points: list[tuple[float, float]]) -> None:
    """Fill a polygon whose points are in [-1, 1], y downwards."""
    scale = _DRAWING_SIZE / 2
    draw.polygon([((x + 1) * scale, (y + 1) * scale) for x, y in points], fill=255)


def _around(radii: list[float]) -> list[tuple[float, float]]:
    """Points at even angles about the centre, clockwise from the top."""
    angles = [2 * math.pi * i / len(radii) for i in range(len(radii))]
    return [(r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]


def _heart() -> list[tuple[float, float]]:
    angles = [2 * math.pi * i / 60 for i in range(60)]
    across = [math.sin(a) ** 3 for a in angles]
    down = [-(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16 for a in angles]
    return [(0.95 * x, 0.95 * y - 0.1) for x, y in zip(across, down, strict=True)]


_BAR = 0.32
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": _around([0.9] * 48),
    "square": [(-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78)],
    "triangle": [(0, -0.95), (0.95, 0.8), (-0.95, 0.8)],
    "star": _around([1.0, 0.42] * 5),
    "heart": _heart(),
    "cross": [
        *[(-_BAR, -0.95), (_BAR, -0.95), (_BAR, -_BAR), (0.95, -_BAR), (0.95, _BAR), (_BAR, _BAR)],
        *[(_BAR, 0.95), (-_BAR, 0.95), (-_BAR, _BAR), (-0.95, _BAR), (-0.95, -_BAR), (-_BAR, -_BAR)],
    ],
}
_DRAW: dict[str, Callable[[ImageDraw.ImageDraw], None]] = {
    shape: partial(_polygon, points=outline) for shape, outline in _OUTLINES.items()
}


DIGITS_AND_SHAPES = World(
    "digits",
    sides={"small": (14, 17), "large": (22, 27)},
    choose=_choose,
    draw=_draw,
    phrases=lambda: [phrase(colour, kind) for colour, kind in product(COLOURS, KINDS)],
    mean=0.36,
    std=0.16,
)
