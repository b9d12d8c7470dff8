"""What open_clip_train trains an epoch with, the same for its major versions."""

from argparse import Namespace
from typing import Any, NamedTuple

from torch import nn


class Epoch(NamedTuple):
    """One call of train_one_epoch.

    Attributes:
        loss: returned by the plug-in's `create_loss`.
        model: as training wraps and compiles it.
        data: of open_clip_train, by split.
        done: number of epochs before this one.
        args: of open_clip_train and of the plug-in.
        tb_writer: of TensorBoard, or None.
    """

    loss: nn.Module
    model: nn.Module
    data: dict[str, Any]
    done: int
    args: Namespace
    tb_writer: Any
