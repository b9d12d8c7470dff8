"""`--sparc-show-every N`: pictures of what words select, while training. Nothing of the training changes by them."""

import io
import itertools
import logging
import random
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip_train import main as open_clip_main
from open_clip_train.data import get_dataset_fn, get_wds_dataset
from PIL import Image
from torch import nn

from sparc_loss.embeddings.surface import Surfaced
from sparc_loss.integration.versions import module_of_generation

PAIRS = 4  # the first of the validation data


def check_run(args: Namespace) -> None:
    """Refuse before training what would fail after an epoch of it.

    Raises:
        ValueError: no validation data or none with captions, or no launcher to call us after an epoch; --fsdp.
        ImportError: the extra `show` is not installed.
    """
    if not args.val_data or args.dataset_type == "synthetic":
        raise ValueError("--sparc-show-every is set without validation pairs; expected --val-data with captions")
    if not hasattr(open_clip_main.train_one_epoch, "__wrapped__"):
        raise ValueError("--sparc-show-every is set; expected it off, or python -m sparc_loss.train to start training")
    if getattr(args, "fsdp", False):
        raise ValueError(
            "--sparc-show-every is set with --fsdp; expected it off: one process draws, and has but its part of the "
            "weights"
        )
    try:
        import sparc_loss.show  # noqa: F401
    except ImportError as error:
        raise ImportError(f"--sparc-show-every: {error}; pip install 'sparc-loss[show]'") from error
    if args.rank == 0:
        validation_pairs(args)


def show_validation_pairs(model: nn.Module, data: dict[str, Any], epoch: int, args: Namespace, tb_writer: Any) -> None:
    """Draw the first validation pairs to RUN/words/epoch_N.png, and to TensorBoard and W&B where they are reported to.

    Args:
        model: surfaced; wrapped and compiled as training has it.
        data: as open_clip_train has it; W&B's steps come from its training half.
        epoch: how many are done.
        args: of open_clip_train, with ours.
        tb_writer: TensorBoard's, or None.
    """
    from sparc_loss.show import align, draw

    while not isinstance(model, Surfaced):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    preprocess = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    aligned = []
    with _random_state_kept():
        tokenizer = open_clip.get_tokenizer(
            args.model, cache_dir=args.cache_dir, context_length=args.force_context_length
        )
        for image, caption in validation_pairs(args):
            try:
                pair = align(
                    image,
                    caption,
                    model,
                    preprocess,
                    tokenizer,
                    threshold=args.sparc_threshold,
                    alignment=args.sparc_alignment,
                )
            except ValueError as error:
                logging.warning(f"--sparc-show-every: a pair is left out: {error}")
            else:
                aligned.append(pair)
        if aligned:
            _report(draw(aligned), data, epoch, args, tb_writer)


def validation_pairs(args: Namespace) -> list[tuple[Image.Image, str]]:
    """The first pairs of `--val-data`, CSV or webdataset, as open_clip_train reads them."""
    one_by_one = Namespace(**{**vars(args), "workers": 0, "batch_size": 1, "variable_text": False})
    images_and_texts = module_of_generation(open_clip.__version__).images_and_texts
    get_dataset = get_dataset_fn(args.val_data, args.dataset_type)
    with _random_state_kept():
        if get_dataset is get_wds_dataset:  # gives batches, which are made of arrays
            batches = get_dataset(one_by_one, np.array, is_train=False, tokenizer=_untokenized).dataloader
            pairs = [images_and_texts(batch) for batch in itertools.islice(batches, PAIRS)]
            return [(Image.fromarray(np.asarray(images[0])), texts[0]) for images, texts in pairs]
        dataset = get_dataset(one_by_one, _as_it_is, is_train=False, tokenizer=_untokenized).dataloader.dataset
        return [images_and_texts(dataset[index]) for index in range(min(PAIRS, len(dataset)))]


def _report(figure: Any, data: dict[str, Any], epoch: int, args: Namespace, tb_writer: Any) -> None:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    if args.save_logs:
        path = Path(args.logs, args.name, "words", f"epoch_{epoch}.png")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(file.getvalue())
        logging.info(f"What words select: {path}")
    picture = Image.open(file).convert("RGB")
    if tb_writer is not None:
        tb_writer.add_image("words", np.asarray(picture), epoch, dataformats="HWC")
    if args.wandb:
        import wandb

        # The step at which open_clip_train's evaluate logs this epoch: W&B refuses to go back.
        step = data["train"].dataloader.num_batches // args.accum_freq * epoch
        wandb.log({"words": wandb.Image(picture)}, step=step)


def _as_it_is(image: Image.Image) -> Image.Image:
    return image


def _untokenized(texts: str | list[str]) -> list[str]:
    """In place of a tokenizer: open_clip_train's readers give one text or a list, and take the first row."""
    return [texts] if isinstance(texts, str) else texts


@contextmanager
def _random_state_kept() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):  # nothing here draws on a GPU
        yield
    random.setstate(python)
    np.random.set_state(numpy)
