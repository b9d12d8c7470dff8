"""The worlds by their names."""

from .digits import DIGITS_AND_SHAPES
from .emoji import EMOJI

WORLDS = {world.name: world for world in (DIGITS_AND_SHAPES, EMOJI)}
