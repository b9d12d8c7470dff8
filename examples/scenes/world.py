"""A world: what its scenes show and how it is drawn. The rest of a scene is the same in every world."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class Group:
    """Objects of a scene that one name stands for: "a red seven", "two dogs".

    Attributes:
        kind: a noun, singular.
        colour: empty in a world where colours are not told.
        count: how many there are.
        plural: of the noun; empty where there is always one.
        named: whether the caption names it; if not, it belongs to the background.
        new_pair: whether the caption names another kind that no training scene shows together with this one.
    """

    kind: str
    colour: str = ""
    count: int = 1
    plural: str = ""
    named: bool = True
    new_pair: bool = False


@dataclass(frozen=True)
class World:
    """Objects and how to draw them.

    Attributes:
        name: under which `worlds.WORLDS` has it.
        sides: size in words -> side of the square an object is drawn in, in pixels: from, up to and with.
        choose: split, index of the scene and random numbers -> the groups of a scene.
        draw: group, side, split and random numbers -> how much the object covers each pixel of its square, float32
            [side, side] in [0, 1], and its colours, [side, side, 3] or [3], up to 255.
        phrases: how the objects of the held-out scenes can be called: the classes of the masks.
        mean: of the pixels, for the model's preprocessing; all channels alike, in [0, 1].
        std: the same.
        patience: how many times as many steps from scratch a study gives it as the digits.
    """

    name: str
    sides: Mapping[str, tuple[int, int]]
    choose: Callable[[Split, int, np.random.Generator], list[Group]]
    draw: Callable[[Group, int, Split, np.random.Generator], tuple[np.ndarray, np.ndarray]]
    phrases: Callable[[], list[str]]
    mean: float
    std: float
    patience: int = 1
