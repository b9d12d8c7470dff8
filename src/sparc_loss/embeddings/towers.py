"""Towers that return their local embeddings from their own call.

The class of a tower is swapped for a subclass whose forward takes `with_embeddings=True`. So forward hooks of the
tower fire, `fully_shard(model.visual)` gathers its parameters for everything that uses them, and
`model.visual.compile()` is used. Without the keyword the tower does what open_clip's does.

Given the keyword, a tower returns a tuple. Its first entry is what the plain call returns. Forward hooks see the
tuple, as they do where open_clip's `output_tokens` is set. All tensors with a gradient are in it, because FSDP2
watches what a module returns.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn


class SurfacedTower:
    """Mixed in before the tower's own class."""

    plain_class: type[nn.Module]
    """The class that `restore_tower` gives back."""


def surface_tower(tower: Any, forward_with_embeddings: Callable[..., tuple]) -> None:
    """Let a tower's call return `forward_with_embeddings(tower, inputs)` where it is given `with_embeddings=True`."""
    plain: Any = type(tower)
    if not issubclass(plain, SurfacedTower):
        tower.__class__ = _surfaced_class(plain, forward_with_embeddings)


def restore_tower(tower: Any) -> None:
    """Give a tower its own class back."""
    if issubclass(type(tower), SurfacedTower):
        tower.__class__ = tower.plain_class


def tower_name(visual: Any) -> str:
    """The name of a vision tower's class, or of its trunk's where it has one, before it was surfaced."""
    trunk = getattr(visual, "trunk", visual)
    return getattr(trunk, "plain_class", type(trunk)).__name__


@functools.cache
def _surfaced_class(plain: Any, forward_with_embeddings: Callable[..., tuple]) -> Any:
    def forward(self: nn.Module, *inputs: Any, with_embeddings: bool = False, **named: Any) -> Any:
        return forward_with_embeddings(self, *inputs) if with_embeddings else plain.forward(self, *inputs, **named)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        made_by = _surfaced_class, plain, forward_with_embeddings
        return new_of_class, made_by, *plain.__reduce_ex__(self, protocol)[2:]

    name = f"Surfaced{plain.__name__}"
    members = {"forward": forward, "plain_class": plain, "__reduce_ex__": reduce, "__module__": __name__}
    return type(name, (SurfacedTower, plain), members)


def new_of_class(make: Callable[..., Any], *arguments: Any) -> Any:
    """An empty object of the class that `make` makes, for pickle: another process does not have that class yet."""
    made = make(*arguments)
    return made.__new__(made)
