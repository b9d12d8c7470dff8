"""What looks at validation pairs between epochs, without a trace in the training."""

import itertools
import random
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip_train import main as open_clip_main
from open_clip_train.data import get_dataset_fn, get_wds_dataset
from PIL import Image
from torch import nn

from sparc_loss.embeddings.surface import Surfaced
from sparc_loss.integration.versions import module_of_generation


def check_launcher(flag: str) -> None:
    """Raise ValueError unless the launcher's hooks are in place, which call us between epochs."""
    if not hasattr(open_clip_main.train_one_epoch, "__wrapped__"):
        raise ValueError(f"{flag} is set; expected it off, or python -m sparc_loss.train to start training")


def check_validation(flag: str, args: Namespace) -> None:
    """Refuse before training what would fail after an epoch of it.

    Raises:
        ValueError: no validation data or none with captions, or no launcher to call us after an epoch; --fsdp.
    """
    if not args.val_data or args.dataset_type == "synthetic":
        raise ValueError(f"{flag} is set without validation pairs; expected --val-data with captions")
    check_launcher(flag)
    if getattr(args, "fsdp", False):
        raise ValueError(
            f"{flag} is set with --fsdp; expected it off: one process looks, and has but its part of the weights"
        )
    if args.rank == 0:
        validation_pairs(args, 1)


def unwrapped(model: nn.Module) -> nn.Module:
    """The surfaced model within what open_clip_train made of it, by DistributedDataParallel or torch.compile."""
    while not isinstance(model, Surfaced):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def wandb_step(data: dict[str, Any], epoch: int, args: Namespace) -> int:
    """The step at which open_clip_train's evaluate logs this epoch: W&B refuses to go back."""
    return data["train"].dataloader.num_batches // args.accum_freq * epoch


def validation_pairs(args: Namespace, number: int) -> list[tuple[Image.Image, str]]:
    """The first `number` pairs of `--val-data`, CSV or webdataset, as open_clip_train reads them."""
    one_by_one = Namespace(**{**vars(args), "workers": 0, "batch_size": 1, "variable_text": False})
    images_and_texts = module_of_generation(open_clip.__version__).images_and_texts
    get_dataset = get_dataset_fn(args.val_data, args.dataset_type)
    with random_state_kept():
        if get_dataset is get_wds_dataset:  # gives batches, which are made of arrays
            batches = get_dataset(one_by_one, np.array, is_train=False, tokenizer=_untokenized).dataloader
            pairs = [images_and_texts(batch) for batch in itertools.islice(batches, number)]
            return [(Image.fromarray(np.asarray(images[0])), texts[0]) for images, texts in pairs]
        dataset = get_dataset(one_by_one, _as_it_is, is_train=False, tokenizer=_untokenized).dataloader.dataset
        return [images_and_texts(dataset[index]) for index in range(min(number, len(dataset)))]


def _as_it_is(image: Image.Image) -> Image.Image:
    return image


def _untokenized(texts: str | list[str]) -> list[str]:
    """In place of a tokenizer: open_clip_train's readers give one text or a list, and take the first row."""
    return [texts] if isinstance(texts, str) else texts


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Random numbers drawn within are not missed afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):  # nothing here draws on a GPU
        yield
    random.setstate(python)
    np.random.set_state(numpy)
