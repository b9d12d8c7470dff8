"""The hooks into open_clip_train: only for the run, only in the names listed in `hooked`."""

import functools
import importlib
import inspect
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import open_clip
import torch
from open_clip_train import main as open_clip_main
from open_clip_train import zero_shot
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from sparc_loss.hooks.epoch import Epoch
from sparc_loss.monitoring.guard import training_goes_on
from sparc_loss.open_clip_versions import major_version
from sparc_loss.plugins.contract import LossPlugin


@contextmanager
def hooked(
    parse_args: Callable[[list[str]], Namespace], plugin: LossPlugin | None
) -> Iterator[Callable[[list[str]], Any]]:
    """Yield open_clip_train's main function, which then trains with `plugin`; undone on exit.

    Replaced names:

    - `open_clip_train.main.parse_args`, by the given function;
    - `open_clip_train.main.create_model_and_transforms`, whose first model goes through `plugin.prepare_model` (the
      second is the teacher of --distill-model);
    - `open_clip_train.main.create_loss` (`open_clip_3.py`) or `create_task` (`open_clip_4.py`), which make the loss.
      An open_clip with the patch from patches/ calls the plug-in itself: there, this name and the previous one stay;
    - `open_clip_train.main.get_data`, if the plug-in has a `create_data`;
    - `open_clip_train.main.train_one_epoch`, if the plug-in has a `before_epoch`, `after_epoch` or `try_after_epoch`,
      which are called before and after it;
    - `open_clip_train.zero_shot.accuracy`, where it fails with numpy 2.4 or newer (`_working_accuracy`);
    - `torch.nn.parallel.DistributedDataParallel`, by a subclass that drops `device_ids` on the CPU: open_clip passes
      some and torch refuses them.

    Args:
        parse_args: takes main's argument list, returns its namespace with the plug-in's arguments.
        plugin: the loss to train with; None leaves model and loss to open_clip.

    Raises:
        RuntimeError: another run of this process has the hooks in place.
    """
    if hasattr(open_clip_main.parse_args, "__wrapped__"):
        raise RuntimeError("open_clip_train.main is hooked already; expected one run at a time in a process")
    of_this_version = module_of_major_version(open_clip.__version__)

    parsed: list[Namespace] = []

    @functools.wraps(open_clip_main.parse_args)
    def parse_and_keep(argv: list[str]) -> Namespace:
        parsed.append(parse_args(argv))
        return parsed[0]

    names: dict[str, Any] = {"parse_args": parse_and_keep}
    has_our_patch = hasattr(open_clip_main, "load_loss_plugin")
    if plugin is not None and not has_our_patch:
        names["create_model_and_transforms"] = _preparing_first_model(
            open_clip_main.create_model_and_transforms, lambda model: plugin.prepare_model(model, parsed[0])
        )
        names |= of_this_version.replacements_for_the_loss(plugin)
    if hasattr(plugin, "create_data"):
        names["get_data"] = _creating_data(plugin, open_clip_main.get_data)
    if any(hasattr(plugin, name) for name in ("before_epoch", "after_epoch", "try_after_epoch")):
        names["train_one_epoch"] = _with_epoch_calls(plugin, of_this_version.of_epoch)
    with (
        patch.multiple(open_clip_main, **names),
        patch.object(zero_shot, "accuracy", _working_accuracy()),
        patch.object(torch.nn.parallel, "DistributedDataParallel", _DistributedDataParallel),
    ):
        yield open_clip_main.main


def module_of_major_version(installed: str) -> ModuleType:
    """`open_clip_3.py` or `open_clip_4.py`, which hold the differences between them; imports open_clip_train."""
    return importlib.import_module(f"sparc_loss.hooks.open_clip_{major_version(installed)}")


def _preparing_first_model(create: Callable[..., tuple], prepare: Callable[[Any], Any]) -> Callable[..., tuple]:
    prepared = False

    @functools.wraps(create)
    def create_model_and_transforms(*args: Any, **kwargs: Any) -> tuple:
        nonlocal prepared
        model, *transforms = create(*args, **kwargs)
        if not prepared:
            prepared = True
            model = prepare(model)
        return (model, *transforms)

    return create_model_and_transforms


def _creating_data(plugin: Any, get_data: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(get_data)
    def create_data(*args: Any, **kwargs: Any) -> dict[str, Any]:
        data: dict[str, Any] = plugin.create_data(get_data, *args, **kwargs)
        return data

    return create_data


def _with_epoch_calls(plugin: Any, of_epoch: Callable[[dict[str, Any]], Epoch]) -> Callable[..., None]:
    """train_one_epoch between the plug-in's calls, as far as it has them. A call that fails becomes a warning."""
    train_one_epoch = open_clip_main.train_one_epoch
    signature = inspect.signature(train_one_epoch)
    tried = False

    @functools.wraps(train_one_epoch)
    def train_between_calls(*args: Any, **kwargs: Any) -> None:
        nonlocal tried
        epoch = of_epoch(signature.bind(*args, **kwargs).arguments)
        if hasattr(plugin, "try_after_epoch") and not tried:
            tried = True
            with training_goes_on("The plug-in's try_after_epoch"):
                plugin.try_after_epoch(epoch.model, epoch.data, epoch.args)
        if hasattr(plugin, "before_epoch"):
            with training_goes_on("The plug-in's before_epoch"):
                plugin.before_epoch(epoch.loss, epoch.done, epoch.args)
        train_one_epoch(*args, **kwargs)
        if hasattr(plugin, "after_epoch"):
            with training_goes_on("The plug-in's after_epoch"):
                plugin.after_epoch(epoch.model, epoch.data, epoch.done + 1, epoch.args, epoch.tb_writer)

    return train_between_calls


def _working_accuracy() -> Callable[..., list[float]]:
    """open_clip's own accuracy, or a replacement where it fails.

    open_clip 3.3 calls float() on an array of one element, which numpy refuses from version 2.4. --imagenet-val would
    end the run after its first epoch, before the checkpoint is written.
    """
    try:
        zero_shot.accuracy(torch.eye(2), torch.arange(2), topk=(1,))
    except TypeError:
        return functools.wraps(zero_shot.accuracy)(_accuracy)
    return zero_shot.accuracy


def _accuracy(output: Tensor, target: Tensor, topk: tuple[int, ...] = (1,)) -> list[float]:
    """The number of `target` [B] that are among the k highest of `output` [B, C], for each k."""
    highest = output.topk(max(topk), dim=1).indices
    found = highest == target[:, None]
    return [found[:, :k].sum().item() for k in topk]


class _DistributedDataParallel(DistributedDataParallel):
    def __init__(self, module: torch.nn.Module, device_ids: list[Any] | None = None, **kwargs: Any) -> None:
        on_cpu = device_ids and torch.device(device_ids[0]).type == "cpu"
        super().__init__(module, device_ids=None if on_cpu else device_ids, **kwargs)
