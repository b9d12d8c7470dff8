"""`--sparc-show-every N`: draws during training what words select, and leaves the training unchanged."""

import io
import logging
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import open_clip
from PIL import Image

from sparc_loss.model_loading import preprocessing_of
from sparc_loss.monitoring.validation_pairs import (
    check_validation,
    random_state_kept,
    unwrapped,
    validation_pairs,
    wandb_step,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWN_PAIRS = 4  # the first of the validation data, one caption per image


def check_run(args: Namespace) -> None:
    """Refuse before training what would fail after its first epoch.

    Raises:
        ValueError: no validation data or none with captions, a training without the launcher, or --fsdp.
        ImportError: the extra `show` is not installed.
    """
    check_validation("--sparc-show-every", args)
    try:
        import sparc_loss.show  # noqa: F401
    except ImportError as error:
        raise ImportError(f"--sparc-show-every: {error}; pip install 'sparc-loss[show]'") from error


def show_validation_pairs(model: Any, data: dict[str, Any], epoch: int, args: Namespace, tb_writer: Any) -> None:
    """Draw the first validation pairs to RUN/words/epoch_N.png, and to TensorBoard and W&B where they are reported to.

    Args:
        model: surfaced, as training wraps and compiles it.
        data: of open_clip_train; its training half gives W&B's step.
        epoch: number of epochs done.
        args: of open_clip_train and of the plug-in.
        tb_writer: of TensorBoard, or None.
    """
    figure = draw_validation_pairs(model, args)
    if figure is not None:
        _report(figure, data, epoch, args, tb_writer)


def draw_validation_pairs(model: Any, args: Namespace, number: int = DRAWN_PAIRS) -> "Figure | None":
    """The figure of the first `number` validation images; None, with a warning for each, if none can be shown.

    Modes, gradients and random states are left unchanged.
    """
    from sparc_loss.show import align, draw

    model = unwrapped(model)
    preprocess = preprocessing_of(model)
    tokenizer = open_clip.get_tokenizer(args.model, cache_dir=args.cache_dir, context_length=args.force_context_length)
    settings = {"threshold": args.sparc_threshold, "alignment": args.sparc_alignment}
    aligned = []
    with random_state_kept():
        for image, caption in validation_pairs(args, number):
            try:
                aligned.append(align(image, caption, model, preprocess, tokenizer, **settings))
            except ValueError as error:
                logging.warning(f"--sparc-show-every: a pair is left out: {error}")
        return draw(aligned) if aligned else None


def _report(figure: "Figure", data: dict[str, Any], epoch: int, args: Namespace, tb_writer: Any) -> None:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    if args.save_logs:
        path = Path(args.logs, args.name, "words", f"epoch_{epoch}.png")
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(file.getvalue())
        logging.info(f"What words select: {path}")
    picture = Image.open(file).convert("RGB")
    if tb_writer is not None:
        tb_writer.add_image("words", np.asarray(picture), epoch, dataformats="HWC")
    if args.wandb:
        import wandb

        wandb.log({"words": wandb.Image(picture)}, step=wandb_step(data, epoch, args))
