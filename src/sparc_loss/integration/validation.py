"""Validation pairs for what is measured and drawn between epochs. Nothing here changes the training."""

import hashlib
import itertools
import random
from argparse import Namespace
from collections.abc import Iterable, Iterator
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
        with random_state_kept():
            next(validation_pairs(args, 1), None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The surfaced model within what open_clip_train made of it, by DistributedDataParallel or torch.compile."""
    while not isinstance(model, Surfaced):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def wandb_step(data: dict[str, Any], epoch: int, args: Namespace) -> int:
    """The step at which open_clip_train's evaluate logs this epoch: W&B refuses to go back."""
    return data["train"].dataloader.num_batches // args.accum_freq * epoch


def validation_pairs(args: Namespace, number: int) -> Iterator[tuple[Image.Image, str]]:
    """The first `number` images of `--val-data`, each with its first caption, as open_clip_train reads them.

    One image is in memory at a time, and its file is closed. An image is the same as an earlier one by its path in a
    CSV, else by its pixels.
    """
    one_by_one = Namespace(**{**vars(args), "workers": 0, "batch_size": 1, "variable_text": False})
    get_dataset = get_dataset_fn(args.val_data, args.dataset_type)
    if get_dataset is get_wds_dataset:  # gives batches, which are made of arrays
        batches = get_dataset(one_by_one, np.array, is_train=False, tokenizer=_untokenized).dataloader
        pairs = ((Image.fromarray(np.asarray(images[0])), texts[0]) for images, texts in map(_halves, batches))
        return itertools.islice(_of_different_pixels(pairs), number)
    dataset = get_dataset(one_by_one, _loaded, is_train=False, tokenizer=_untokenized).dataloader.dataset
    if hasattr(dataset, "images"):  # CsvDataset: the paths
        first_rows = {path: row for row, path in reversed(list(enumerate(dataset.images)))}
        return (_halves(dataset[row]) for row in sorted(first_rows.values())[:number])
    return itertools.islice(_of_different_pixels(map(_halves, dataset)), number)


def _halves(sample: Any) -> tuple[Any, Any]:
    return module_of_generation(open_clip.__version__).images_and_texts(sample)


def _of_different_pixels(pairs: Iterable[tuple[Image.Image, str]]) -> Iterator[tuple[Image.Image, str]]:
    known = set()
    for image, caption in pairs:
        digest = hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).digest()
        if digest not in known:
            known.add(digest)
            yield image, caption


def _loaded(image: Image.Image) -> Image.Image:
    """The image in memory; open_clip_train leaves its file open."""
    with image:
        return image.copy()


def _untokenized(texts: str | list[str]) -> list[str]:
    """In place of a tokenizer: open_clip_train's readers give one text or a list, and take the first row."""
    return [texts] if isinstance(texts, str) else texts


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the state of the random generators on exit, also after an error."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):  # nothing here draws on a GPU
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
