"""Hooks for open_clip_train 4.x: create_task and the arguments of train_one_epoch.

A task holds model and loss, runs both, and returns the terms to training. The hook takes the task that open_clip
creates from its flags and replaces the loss in it.
"""

import functools
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from open_clip.task import CoCaTask, TrainingTask
from open_clip_train import main as open_clip_main
from torch import Tensor

from sparc_loss.hooks.epoch import Epoch
from sparc_loss.plugins.contract import LossPlugin


def replacements_for_the_loss(plugin: LossPlugin) -> dict[str, Callable[..., Any]]:
    """Replacements in `open_clip_train.main`, by name."""
    create_task = open_clip_main.create_task

    @functools.wraps(create_task)
    def create_task_with_plugin(args: Namespace, *others: Any, **named: Any) -> TrainingTask:
        return with_loss(create_task(args, *others, **named), lambda: plugin.create_loss(args))

    return {"create_task": create_task_with_plugin}


def with_loss(task: TrainingTask, create_loss: Callable[[], Any]) -> TrainingTask:
    """The task with another loss; a CoCaTask then passes all of the model's outputs to it.

    Raises:
        TypeError: a task without a loss, because the model computes its own.
    """
    if not hasattr(task, "loss"):
        raise TypeError(
            f"open_clip trains this model by a {type(task).__name__}, which calls no loss; expected a task that does: "
            "CLIPTask, SigLIPTask, CoCaTask, DistillCLIPTask or CLAPTask"
        )
    if type(task) is CoCaTask:
        task.__class__ = CoCaTaskWithAllOutputs
    task.loss = create_loss()
    return task


class CoCaTaskWithAllOutputs(CoCaTask):
    """open_clip's CoCaTask; without this class it passes only five of the model's outputs to its loss."""

    def _build_loss_inputs(self, model_out: dict[str, Tensor], batch: dict[str, Any]) -> dict[str, Tensor]:
        others = {name: value for name, value in model_out.items() if name != "logit_bias"}  # CoCaLoss takes none
        return {**others, **super()._build_loss_inputs(model_out, batch)}


def of_epoch(given: dict[str, Any]) -> Epoch:
    """The epoch, from the arguments of train_one_epoch by name."""
    task, epoch = given["state"].task, given["state"].epoch
    return Epoch(task.loss, task.trainable_module, given["data"], epoch, given["args"], given.get("tb_writer"))
