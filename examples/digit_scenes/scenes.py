"""Scenes of handwritten digits and drawn shapes on textured noise, each with a caption and its ground truth.

A scene is a function of (seed, split, index) alone: `generate_scene("val", 7)` is the same picture and caption however
many others are made. The digits are scikit-learn's, written by hand; a glyph serves one split only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits

from .captions import Mention, describe, phrase

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

IMAGE_SIZE = 64
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
# Side of the square an object is drawn in, in pixels: from, up to and with.
SIDES = {"small": (14, 17), "large": (22, 27)}

_OBJECTS = (2, 5)
_MARGIN = 1
_TRIES = 30
_MASK_LEVEL = 0.4
_DRAWING_SIZE = 96
# Glyphs 0-65 % of each digit, in the order of the data set, are for training, 65-82 % for val, the rest for test.
# That order goes writer by writer, so that most hands of the held-out splits are new.
_GLYPH_SHARES: dict[Split, tuple[float, float]] = {"train": (0.0, 0.65), "val": (0.65, 0.82), "test": (0.82, 1.0)}


@dataclass(frozen=True)
class SceneObject:
    """An object of a scene and the words that name it.

    Attributes:
        box: left, top, right, bottom of its mask in pixels, right and bottom exclusive.
        words: what a word says of it ("colour", "kind" or "size") -> index of that word in `caption.split()`.
            Only what the caption says.
    """

    kind: str
    colour: str
    size: str
    box: tuple[int, int, int, int]
    words: dict[str, int] = field(default_factory=dict)

    @property
    def phrase(self) -> str:
        """Colour and kind with an article: "a red seven". No two objects of a scene share it."""
        return phrase(self.colour, self.kind)


@dataclass(frozen=True)
class Scene:
    """A picture, its caption and, for evaluation only, what is where.

    Attributes:
        image: uint8 [64, 64, 3].
        labels: uint8 [64, 64]; 0 is background, i + 1 the pixels of `objects[i]`.
        caption: 6 to 25 words.
    """

    image: np.ndarray
    labels: np.ndarray
    caption: str
    objects: tuple[SceneObject, ...]


def generate_scene(split: Split, index: int, seed: int = 0) -> Scene:
    """Make scene `index` of a split.

    Raises:
        ValueError: unknown split, or a negative index.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(map(repr, SPLITS))}")
    if index < 0:
        raise ValueError(f"index is {index}; expected 0 or more")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    names = _choose_names(rng)
    places = _place(len(names), rng)

    canvas = _texture(rng)
    labels = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    mentions = []
    for number, ((kind, colour), (size, side, left, top)) in enumerate(zip(names, places, strict=True), start=1):
        opacity = _stencil(kind, side, split, rng)
        window = slice(top, top + side), slice(left, left + side)
        paint = np.asarray(COLOURS[colour]) + rng.uniform(-12, 12, 3)
        canvas[window] += opacity[..., None] * (paint - canvas[window])
        labels[window][opacity > _MASK_LEVEL] = number
        mentions.append(Mention(kind, colour, size, _box(labels == number)))

    caption, words = describe(mentions, rng)
    objects = tuple(
        SceneObject(mention.kind, mention.colour, mention.size, mention.box, said)
        for mention, said in zip(mentions, words, strict=True)
    )
    # Steps of 4 grey levels: nobody sees them, and the PNG is a third smaller.
    image = np.clip(canvas / 4, 0, 63).astype(np.uint8) * 4
    return Scene(image, labels, caption, objects)


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


def _choose_names(rng: np.random.Generator) -> list[tuple[str, str]]:
    """Kind and colour of each object; kinds and colours may return, a pair of both may not."""
    count = rng.integers(_OBJECTS[0], _OBJECTS[1] + 1)
    pairs = rng.choice(len(KINDS) * len(COLOURS), count, replace=False)
    return [(KINDS[pair // len(COLOURS)], list(COLOURS)[pair % len(COLOURS)]) for pair in pairs.tolist()]


def _place(count: int, rng: np.random.Generator) -> list[tuple[str, int, int, int]]:
    """Size, side, left and top of squares that do not touch."""
    placed: list[tuple[str, int, int, int]] = []
    while len(placed) < count:
        # A set of sizes that finds no room is drawn anew: five large objects do not fit.
        sizes = [list(SIDES)[i] for i in rng.integers(len(SIDES), size=count)]
        placed = []
        for size in sizes:
            side = int(rng.integers(SIDES[size][0], SIDES[size][1] + 1))
            corners = rng.integers(0, IMAGE_SIZE - side + 1, (_TRIES, 2)).tolist()
            free = (c for c in corners if all(_apart(side, *c, *other) for _, *other in placed))
            corner = next(free, None)
            if corner is None:
                break
            placed.append((size, side, *corner))
    return placed


def _apart(side: int, left: int, top: int, other_side: int, other_left: int, other_top: int) -> bool:
    return (
        left >= other_left + other_side + _MARGIN
        or other_left >= left + side + _MARGIN
        or top >= other_top + other_side + _MARGIN
        or other_top >= top + side + _MARGIN
    )


def _texture(rng: np.random.Generator) -> np.ndarray:
    """Clouds and grain of a greyish tint, float32 [64, 64, 3]."""
    cells = int(rng.integers(3, 9))
    clouds = Image.fromarray(rng.uniform(50, 120, (cells, cells)).astype(np.float32))
    clouds = np.asarray(clouds.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
    grain = rng.normal(0, rng.uniform(4, 12), (IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)
    tint = rng.uniform(0.85, 1.15, 3).astype(np.float32)
    return (clouds + grain)[..., None] * tint


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


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
