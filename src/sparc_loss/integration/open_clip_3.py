"""What of open_clip_train 3.x the hooks replace: create_loss, and train_one_epoch with its own arguments; its data."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from open_clip_train import main as open_clip_main

from sparc_loss.integration.plugin import LossPlugin


def bringing_in_the_loss(plugin: LossPlugin) -> dict[str, Callable[..., Any]]:
    """Replacements in `open_clip_train.main`, by name."""
    return {"create_loss": functools.wraps(open_clip_main.create_loss)(plugin.create_loss)}


def images_and_texts(sample: tuple) -> tuple[Any, Any]:
    """The two halves of what a dataset or a data loader of open_clip_train gives."""
    images, texts = sample
    return images, texts


def with_epoch_calls(plugin: LossPlugin) -> Callable[..., None]:
    """train_one_epoch between the plug-in's `before_epoch` and `after_epoch`, each where it has one."""
    train_one_epoch = open_clip_main.train_one_epoch
    signature = inspect.signature(train_one_epoch)

    @functools.wraps(train_one_epoch)
    def train_between_calls(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs).arguments
        epoch = given["epoch"]
        if hasattr(plugin, "before_epoch"):
            plugin.before_epoch(given["loss"], epoch, given["args"])
        train_one_epoch(*args, **kwargs)
        if hasattr(plugin, "after_epoch"):
            plugin.after_epoch(given["model"], given["data"], epoch + 1, given["args"], given.get("tb_writer"))

    return train_between_calls
