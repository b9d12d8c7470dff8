"""The contract of a loss plug-in. `sparc_loss.plugins.discovery` finds plug-ins by entry point."""

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import nn

CALLABLES = ("add_arguments", "prepare_model", "create_loss")


class LossPlugin(Protocol):
    """What an entry point of the group `open_clip.losses` loads to.

    It may have more, which the launcher calls in every process and a patched open_clip does not:

    - `check_args(args)`, before open_clip_train writes anything. What it raises (ValueError, TypeError or ImportError)
      becomes one line of error, and the same command can be given again; later, the run's folder exists. `args` has
      `rank`, `local_rank`, `world_size` and `distributed` already;
    - `create_data(get_data, args, transforms, **others)`, in place of open_clip_train's get_data, which it is given to
      call, and whose result it returns;
    - `before_epoch(loss, epoch, args)`, with the loss that `create_loss` returned and the number of epochs done, those
      before a --resume included;
    - `after_epoch(model, data, epoch, args, tb_writer)`, with the arguments of open_clip_train's own evaluate. It must
      leave the training unchanged;
    - `try_after_epoch(model, data, args)`, once before the first epoch: it does the work of `after_epoch` on little
      data and writes nothing, so that a failure shows before an epoch is spent.

    If one of the last three raises, a warning shows the traceback and training goes on. What they do on one process
    only must not use collective operations.
    """

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the loss's own flags to `parser`, best in an argument group of their own."""

    def prepare_model(self, model: "nn.Module", args: Namespace) -> "nn.Module":
        """Return the model to train, once created and before it is locked, wrapped or compiled."""

    def create_loss(self, args: Namespace) -> "nn.Module":
        """Return the loss, called as `loss(**model_output, output_dict=True)`: a dict of weighted terms."""
