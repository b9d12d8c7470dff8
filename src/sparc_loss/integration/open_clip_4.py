"""What is particular to open_clip_train 4.x: create_task, the arguments of train_one_epoch, its data.

There a task holds model and loss: it runs both, and training asks it for the terms. So the hook takes the task that
open_clip makes of its flags and gives it the plug-in's loss.
"""

import functools
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from open_clip.task import CoCaTask, TrainingTask
from open_clip_train import main as open_clip_main
from torch import Tensor

from sparc_loss.integration.plugin import Epoch, LossPlugin


def bringing_in_the_loss(plugin: LossPlugin) -> dict[str, Callable[..., Any]]:
    """Replacements in `open_clip_train.main`, by name."""
    create_task = open_clip_main.create_task

    @functools.wraps(create_task)
    def create_task_with_plugin(args: Namespace, *others: Any, **named: Any) -> TrainingTask:
        return with_loss(create_task(args, *others, **named), lambda: plugin.create_loss(args))

    return {"create_task": create_task_with_plugin}


def with_loss(task: TrainingTask, create_loss: Callable[[], Any]) -> TrainingTask:
    """The task, training with another loss; a CoCaTask hands it all that the model returns.

    Raises:
        TypeError: a task that calls no loss, because the model computes its own.
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
    """open_clip's CoCaTask, which else hands its loss five of the model's outputs by name."""

    def _build_loss_inputs(self, model_out: dict[str, Tensor], batch: dict[str, Any]) -> dict[str, Tensor]:
        others = {name: value for name, value in model_out.items() if name != "logit_bias"}  # CoCaLoss knows none
        return {**others, **super()._build_loss_inputs(model_out, batch)}


def images_and_texts(sample: dict[str, Any]) -> tuple[Any, Any]:
    """The two halves of what a dataset or a data loader of open_clip_train gives."""
    return sample["image"], sample["text"]


def of_epoch(given: dict[str, Any]) -> Epoch:
    """The epoch that train_one_epoch is called for, from its arguments by name."""
    task, epoch = given["state"].task, given["state"].epoch
    return Epoch(task.loss, task.trainable_module, given["data"], epoch, given["args"], given.get("tb_writer"))
