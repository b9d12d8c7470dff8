"""`--sparc-show-every N`: pictures of what words select, while training. Nothing of the training changes by them."""

import io
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import nn

from sparc_loss.integration.validation import (
    check_validation,
    random_state_kept,
    unwrapped,
    validation_pairs,
    wandb_step,
)

PAIRS = 4  # the first of the validation data


def check_run(args: Namespace) -> None:
    """Refuse before training what would fail after an epoch of it.

    Raises:
        ValueError: no validation data or none with captions, or no launcher to call us after an epoch; --fsdp.
        ImportError: the extra `show` is not installed.
    """
    check_validation("--sparc-show-every", args)
    try:
        import sparc_loss.show  # noqa: F401
    except ImportError as error:
        raise ImportError(f"--sparc-show-every: {error}; pip install 'sparc-loss[show]'") from error


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

    model = unwrapped(model)
    preprocess = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    aligned = []
    with random_state_kept():
        tokenizer = open_clip.get_tokenizer(
            args.model, cache_dir=args.cache_dir, context_length=args.force_context_length
        )
        for image, caption in validation_pairs(args, PAIRS):
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

        wandb.log({"words": wandb.Image(picture)}, step=wandb_step(data, epoch, args))
