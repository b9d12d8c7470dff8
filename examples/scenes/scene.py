"""Scenes of objects on textured noise, each with a caption and its ground truth.

A scene is a function of (world, seed, split, index) alone: `generate_scene(world, "val", 7)` is the same picture and
caption however many others are made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from .captions import Box, Mention, describe, phrase
from .world import SPLITS, Split, World

IMAGE_SIZE = 64

_MARGIN = 1
_TRIES = 30
_MASK_LEVEL = 0.4


@dataclass(frozen=True)
class SceneObject:
    """What a caption names: one object, or several of a kind.

    Attributes:
        kind: a noun, singular.
        colour: empty in a world where colours are not told.
        size: "small" or "large".
        boxes: left, top, right, bottom of the mask of each in pixels, right and bottom exclusive.
        plural: of the noun; empty in a world where there is always one.
        new_pair: whether the caption names another kind that no training scene shows together with this one.
        words: what a word says of it ("colour", "kind" or "size") -> index of that word in `caption.split()`.
            Only what the caption says.
    """

    kind: str
    colour: str
    size: str
    boxes: tuple[Box, ...]
    plural: str = ""
    new_pair: bool = False
    words: dict[str, int] = field(default_factory=dict)

    @property
    def phrase(self) -> str:
        """Colour and kind with an article: "a red seven", "a dog". No two of a scene share it."""
        return phrase(self.colour, self.kind) if self.colour else phrase(self.kind)


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


def generate_scene(world: World, split: Split, index: int, seed: int = 0) -> Scene:
    """Make scene `index` of a split.

    Raises:
        ValueError: unknown split, or a negative index.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(map(repr, SPLITS))}")
    if index < 0:
        raise ValueError(f"index is {index}; expected 0 or more")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    groups = world.choose(split, index, rng)
    places = _place([group.count for group in groups], world.sides, rng)

    canvas = _texture(rng)
    labels = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    mentions = []
    for group, (size, squares) in zip(groups, places, strict=True):
        boxes = []
        for side, left, top in squares:
            opacity, colours = world.draw(group, side, split, rng)
            window = slice(top, top + side), slice(left, left + side)
            canvas[window] += opacity[..., None] * (colours - canvas[window])
            if group.named:
                labels[window][opacity > _MASK_LEVEL] = len(mentions) + 1
                boxes.append(_box(opacity > _MASK_LEVEL, left, top))
        if group.named:
            mentions.append(Mention(group, size, tuple(boxes)))

    caption, words = describe(mentions, rng)
    objects = tuple(
        SceneObject(each.kind, each.colour, mention.size, mention.boxes, each.plural, each.new_pair, said)
        for mention, said in zip(mentions, words, strict=True)
        for each in [mention.group]
    )
    # Steps of 4 grey levels: nobody sees them, and the PNG is a third smaller.
    image = np.clip(canvas / 4, 0, 63).astype(np.uint8) * 4
    return Scene(image, labels, caption, objects)


def _place(
    counts: Sequence[int], sides: Mapping[str, tuple[int, int]], rng: np.random.Generator
) -> list[tuple[str, list[tuple[int, int, int]]]]:
    """For each group its size, and side, left and top of as many squares; no squares touch."""
    while True:
        # A set of sizes that finds no room is drawn anew: five large objects do not fit.
        sizes = [list(sides)[i] for i in rng.integers(len(sides), size=len(counts))]
        placed: list[tuple[int, int, int]] = []
        for size in (size for size, count in zip(sizes, counts, strict=True) for _ in range(count)):
            side = int(rng.integers(sides[size][0], sides[size][1] + 1))
            corners = rng.integers(0, IMAGE_SIZE - side + 1, (_TRIES, 2)).tolist()
            free = (c for c in corners if all(_apart(side, *c, *other) for other in placed))
            corner = next(free, None)
            if corner is None:
                break
            placed.append((side, *corner))
        if len(placed) == sum(counts):
            squares = iter(placed)
            return [(size, [next(squares) for _ in range(n)]) for size, n in zip(sizes, counts, strict=True)]


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


def _box(mask: np.ndarray, left: int, top: int) -> Box:
    """The box of a mask whose corner lies at (left, top)."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1
