"""What is particular to open_clip_train 3.x: create_loss, the arguments of train_one_epoch, its data."""

import functools
from collections.abc import Callable
from typing import Any

from open_clip_train import main as open_clip_main

from sparc_loss.integration.plugin import Epoch, LossPlugin


def bringing_in_the_loss(plugin: LossPlugin) -> dict[str, Callable[..., Any]]:
    """Replacements in `open_clip_train.main`, by name."""
    return {"create_loss": functools.wraps(open_clip_main.create_loss)(plugin.create_loss)}


def images_and_texts(sample: tuple) -> tuple[Any, Any]:
    """The two halves of what a dataset or a data loader of open_clip_train gives."""
    images, texts = sample
    return images, texts


def of_epoch(given: dict[str, Any]) -> Epoch:
    """The epoch that train_one_epoch is called for, from its arguments by name."""
    return Epoch(given["loss"], given["model"], given["data"], given["epoch"], given["args"], given.get("tb_writer"))
