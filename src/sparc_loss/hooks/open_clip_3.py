"""Hooks for open_clip_train 3.x: create_loss and the arguments of train_one_epoch."""

import functools
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from open_clip_train import main as open_clip_main
from torch import nn

from sparc_loss.hooks.epoch import Epoch
from sparc_loss.plugins.contract import LossPlugin


def replacements_for_the_loss(plugin: LossPlugin) -> dict[str, Callable[..., Any]]:
    """Replacements in `open_clip_train.main`, by name."""

    @functools.wraps(open_clip_main.create_loss)
    def create_loss(args: Namespace) -> nn.Module:
        return plugin.create_loss(args)

    return {"create_loss": create_loss}


def of_epoch(given: dict[str, Any]) -> Epoch:
    """The epoch, from the arguments of train_one_epoch by name."""
    return Epoch(given["loss"], given["model"], given["data"], given["epoch"], given["args"], given.get("tb_writer"))
