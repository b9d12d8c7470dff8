"""Validation pairs for measures and figures between epochs. Nothing here changes the training."""

import hashlib
import itertools
import random
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from open_clip_train import main as open_clip_main
from open_clip_train.data import get_dataset_fn, get_wds_dataset
from PIL import Image

from sparc_loss.embeddings.surface import Surfaced


def check_launcher(flag: str) -> None:
    """Raise ValueError unless the launcher's hooks, which call the plug-in between epochs, are in place."""
    if not hasattr(open_clip_main.train_one_epoch, "__wrapped__"):
        raise ValueError(f"{flag} is set; expected it off, or python -m sparc_loss.train to start training")


def check_validation(flag: str, args: Namespace) -> None:
    """Refuse before training what would fail after its first epoch.

    Raises:
        ValueError: no validation data or none with captions, a training without the launcher, or --fsdp.
    """
    if not args.val_data or args.dataset_type == "synthetic":
        raise ValueError(f"{flag} is set without validation pairs; expected --val-data with captions")
    check_launcher(flag)
    if getattr(args, "fsdp", False):
        raise ValueError(
            f"{flag} is set with --fsdp; expected it off: it runs on one process, which holds a shard of the weights"
        )
    if args.rank == 0:
        with random_state_kept():
            next(validation_pairs(args, 1), None)


def unwrapped(model: Any) -> Any:
    """The surfaced model inside the wrappers of DistributedDataParallel and torch.compile."""
    while not isinstance(model, Surfaced):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def wandb_step(data: dict[str, Any], epoch: int, args: Namespace) -> int:
    """The step at which open_clip_train's evaluate logs this epoch: W&B rejects an earlier one."""
    return data["train"].dataloader.num_batches // args.accum_freq * epoch


def validation_pairs(args: Namespace, number: int) -> Iterator[tuple[Image.Image, str]]:
    """The first `number` images of `--val-data`, each with its first caption, as open_clip_train reads them.

    One image is in memory at a time, and its file is closed. Images of a CSV are the same if they have the same path,
    others if they have the same pixels.
    """
    one_by_one = Namespace(**{**vars(args), "workers": 0, "batch_size": 1, "variable_text": False})
    get_dataset = get_dataset_fn(args.val_data, args.dataset_type)
    if get_dataset is get_wds_dataset:  # it yields batches, which need arrays
        batches = get_dataset(one_by_one, np.array, is_train=False, tokenizer=_untokenized).dataloader
        pairs = ((Image.fromarray(np.asarray(images[0])), texts[0]) for images, texts in map(_halves, batches))
        return itertools.islice(_of_different_pixels(pairs), number)
    dataset = get_dataset(one_by_one, _loaded, is_train=False, tokenizer=_untokenized).dataloader.dataset
    if hasattr(dataset, "images"):  # CsvDataset: the paths
        first_rows = {path: row for row, path in reversed(list(enumerate(dataset.images)))}
        return (_of_row(dataset, row) for row in sorted(first_rows.values())[:number])
    return itertools.islice(_of_different_pixels(map(_halves, dataset)), number)


def _of_row(dataset: Any, row: int) -> tuple[Any, Any]:
    try:
        return _halves(dataset[row])
    except (OSError, SyntaxError) as error:  # PIL raises SyntaxError for a broken PNG
        raise ValueError(f"--val-data: {dataset.images[row]} cannot be read ({error}); expected an image") from error


def _halves(sample: Any) -> tuple[Any, Any]:
    """Image and text of a sample or a batch: a tuple in open_clip 3, a dictionary in open_clip 4."""
    if isinstance(sample, dict):
        return sample["image"], sample["text"]
    image, text = sample
    return image, text


def _of_different_pixels(pairs: Iterable[tuple[Image.Image, str]]) -> Iterator[tuple[Image.Image, str]]:
    known = set()
    for image, caption in pairs:
        digest = hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).digest()
        if digest not in known:
            known.add(digest)
            yield image, caption


def _loaded(image: Image.Image) -> Image.Image:
    """The image in memory, with its file closed, which open_clip_train leaves open."""
    with image:
        return image.copy()


def _untokenized(texts: str | list[str]) -> list[str]:
    """Takes the place of a tokenizer: open_clip_train's readers pass one text or a list, and use the first row."""
    return [texts] if isinstance(texts, str) else texts


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the random state on exit, also after an error."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):  # nothing here draws on a GPU
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
