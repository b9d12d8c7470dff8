"""Discovery of loss plug-ins by entry point.

A package offers a loss under the name `foo` by an entry point in the group `open_clip.losses`:

    [project.entry-points."open_clip.losses"]
    foo = "my_package.foo_plugin:FOO"

It loads to a module or object with the three callables of `LossPlugin`. Then `--loss foo` trains with it, through
`python -m sparc_loss.train` or an open_clip with the patch from this project's patches/.
"""

import difflib
import logging
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from sparc_loss.plugins.contract import CALLABLES, LossPlugin

GROUP = "open_clip.losses"
BUILT_IN = "clip"  # the loss that open_clip's own create_loss makes from the other flags


class PluginError(Exception):
    """A loss plug-in that is unknown, or cannot be loaded."""


def registered_losses() -> dict[str, EntryPoint]:
    """The entry points of all installed packages by name; none is loaded. Warns where two packages share a name."""
    losses: dict[str, EntryPoint] = {}
    for entry_point in entry_points(group=GROUP):
        first = losses.setdefault(entry_point.name, entry_point)
        if _package(first) != _package(entry_point):
            logging.warning(
                f"--loss {entry_point.name} is registered by {_package(first)} and by {_package(entry_point)}; "
                f"the one of {_package(first)} is taken"
            )
    return losses


def find_loss(name: str) -> EntryPoint:
    """The entry point of a loss, which is not loaded.

    Raises:
        PluginError: nothing is registered under the name; the known names and the nearest are listed.
    """
    losses = registered_losses()
    if name not in losses:
        raise PluginError(_unknown(name, [BUILT_IN, *losses]))
    return losses[name]


def load_loss(name: str) -> LossPlugin:
    """Load the plug-in registered as `name`, and only that one.

    Raises:
        PluginError: nothing is registered under the name (the known names and the nearest are listed), its import
            fails (the cause is chained), or it lacks one of the three callables.
    """
    entry_point = find_loss(name)
    where = f"{entry_point.value} of {_package(entry_point)}"
    try:
        plugin: Any = entry_point.load()
    except Exception as error:
        raise PluginError(f"loss {name!r} ({where}) cannot be loaded: {type(error).__name__}: {error}") from error
    missing = [callable_name for callable_name in CALLABLES if not callable(getattr(plugin, callable_name, None))]
    if missing:
        raise PluginError(f"loss {name!r} ({where}) lacks {', '.join(missing)}; expected {', '.join(CALLABLES)}")
    return plugin


def load_all_losses() -> dict[str, LossPlugin]:
    """Every plug-in that loads, by name; the others are warned about."""
    plugins = {}
    for name in registered_losses():
        try:
            plugins[name] = load_loss(name)
        except PluginError as error:
            logging.warning(error)
    return plugins


def _unknown(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown loss {name!r}; known: {', '.join(known)}{hint}"


def _package(entry_point: EntryPoint) -> str:
    distribution = entry_point.dist
    return f"{distribution.name} {distribution.version}" if distribution else "an unnamed package"
