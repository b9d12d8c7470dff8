"""The contract of a loss plug-in and its discovery by entry point.

A package offers a loss under the name `foo` by an entry point in the group `open_clip.losses`:

    [project.entry-points."open_clip.losses"]
    foo = "my_package.foo_plugin"

which loads to a module or object with the three callables of `LossPlugin`. Then `--loss foo` trains with it, through
`python -m sparc_loss.train` or an open_clip with the patch from this project's patches/.
"""

import difflib
import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple, Protocol

from torch import nn

GROUP = "open_clip.losses"
BUILT_IN = "clip"  # whatever open_clip's own create_loss makes from the other flags


class LossPlugin(Protocol):
    """What an entry point of the group `open_clip.losses` loads to.

    It may have more, which the launcher calls in every process and a patched open_clip does not:

    - `check_args(args)`, before open_clip_train writes anything. What it raises (ValueError, TypeError or ImportError)
      becomes one line of error, and the same command can be given again; later, the run's folder exists. `args` has
      `rank`, `local_rank`, `world_size` and `distributed` already;
    - `before_epoch(loss, epoch, args)`, with the loss that `create_loss` returned and the number of epochs done, those
      before a --resume included;
    - `after_epoch(model, data, epoch, args, tb_writer)`, with the arguments of open_clip_train's own evaluate. It must
      leave the training unchanged;
    - `try_after_epoch(model, data, args)`, once before the first epoch: it does the work of `after_epoch` on little
      data and writes nothing, so that a failure shows before an epoch is spent.

    If one of these three raises, a warning shows the traceback and training goes on. What they do on one process only
    must not use collective operations.
    """

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the loss's own flags to `parser`, best in an argument group of their own."""

    def prepare_model(self, model: nn.Module, args: Namespace) -> nn.Module:
        """Return the model to train, once created and before it is locked, wrapped or compiled."""

    def create_loss(self, args: Namespace) -> nn.Module:
        """Return the loss, called as `loss(**model_output, output_dict=True)`: a dict of weighted terms."""


class Epoch(NamedTuple):
    """What open_clip_train trains an epoch with.

    Attributes:
        loss: that `create_loss` returned.
        model: wrapped and compiled as training has it.
        data: open_clip_train's, by split.
        done: number of epochs before this one.
        args: open_clip_train's, with those of the plug-in.
        tb_writer: TensorBoard's, or None.
    """

    loss: nn.Module
    model: nn.Module
    data: dict[str, Any]
    done: int
    args: Namespace
    tb_writer: Any


CALLABLES = ("add_arguments", "prepare_model", "create_loss")


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


def load_loss(name: str) -> LossPlugin:
    """Load the plug-in registered as `name`, and only that one.

    Raises:
        PluginError: nothing is registered under the name (the known names and the nearest are listed), its import
            fails (the cause is chained), or it lacks one of the three callables.
    """
    losses = registered_losses()
    if name not in losses:
        raise PluginError(_unknown(name, [BUILT_IN, *losses]))
    entry_point = losses[name]
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
