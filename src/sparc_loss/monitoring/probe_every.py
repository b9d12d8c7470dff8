"""`--sparc-probe-every N`: measures during training whether the fine-grained loss uses the image."""

import itertools
import json
import logging
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip_train.precision import get_autocast
from torch import Tensor

from sparc_loss.embeddings.modes import evaluation_mode
from sparc_loss.evaluation import ImageDependence, image_dependence, mean_image_dependence
from sparc_loss.model_loading import preprocessing_of
from sparc_loss.monitoring.validation_pairs import (
    check_validation,
    random_state_kept,
    unwrapped,
    validation_pairs,
    wandb_step,
)

PROBED_PAIRS = 256  # the first of the validation data, one caption per image
BATCH_SIZE = 64


def check_run(args: Namespace) -> None:
    """Refuse before training what would fail after its first epoch.

    Raises:
        ValueError: fewer than two validation pairs, none with captions, a training without the launcher, or --fsdp.
    """
    check_validation("--sparc-probe-every", args)
    if args.rank == 0:
        with random_state_kept():
            number = len(list(validation_pairs(args, 2)))
        if number < 2:
            raise ValueError(
                f"--sparc-probe-every is set with {number} validation image; expected 2 or more, to shuffle them"
            )


def probe_validation_pairs(
    model: Any, data: dict[str, Any], epoch: int, args: Namespace, tb_writer: Any
) -> ImageDependence | None:
    """Measure `image_dependence` on the first validation pairs, log it, and report it where training reports to.

    Each call appends a line to RUN/image_dependence.jsonl. TensorBoard and W&B get
    image_dependence/right_token_accuracy and so on.

    Args:
        model: surfaced, as training wraps and compiles it.
        data: of open_clip_train; its training half gives W&B's step.
        epoch: number of epochs done.
        args: of open_clip_train and of the plug-in.
        tb_writer: of TensorBoard, or None.

    Returns:
        The measurement; None, with a warning, if no caption has a word or the embeddings are not finite.
    """
    try:
        measured = measure_validation_pairs(model, args)
    except ValueError as error:
        logging.warning(f"--sparc-probe-every: nothing is measured after epoch {epoch}: {error}")
        return None
    _report(measured, data, epoch, args, tb_writer)
    return measured


def try_probe(model: Any, args: Namespace) -> None:
    """Measure two images and report nothing but a warning where they have nothing to measure."""
    try:
        measure_validation_pairs(model, args, number=2)
    except ValueError as error:
        logging.warning(f"--sparc-probe-every, tried before training: nothing is measured: {error}")


def measure_validation_pairs(model: Any, args: Namespace, number: int | None = None) -> ImageDependence:
    """`image_dependence` of the first `number` validation images (PROBED_PAIRS if None), in the training's precision.

    Modes, gradients and random states are left unchanged.

    Raises:
        ValueError: no caption has a word, or the embeddings are not finite.
    """
    model = unwrapped(model)
    preprocess = preprocessing_of(model)
    with random_state_kept(), torch.inference_mode(), evaluation_mode(model):
        # Preprocessed one by one: many decoded photographs would fill the memory.
        pairs = ((preprocess(image), caption) for image, caption in validation_pairs(args, number or PROBED_PAIRS))
        return mean_image_dependence(list(_measured_by_batch(model, pairs, args)))


def _measured_by_batch(model: Any, pairs: Iterator[tuple[Tensor, str]], args: Namespace) -> Iterator[ImageDependence]:
    tokenizer = open_clip.get_tokenizer(args.model, cache_dir=args.cache_dir, context_length=args.force_context_length)
    device = next(model.parameters()).device
    autocast = get_autocast(args.precision, device_type=device.type)
    while len(batch := list(itertools.islice(pairs, BATCH_SIZE))) > 1:  # a last pair alone cannot be shuffled
        pixels, captions = zip(*batch, strict=True)
        images = torch.stack(pixels).to(device, open_clip.get_input_dtype(args.precision))
        with autocast():
            patches, _ = model.encode_patches(images)
            tokens, mask = model.encode_tokens(tokenizer(list(captions)).to(device))
        yield image_dependence(
            patches,
            tokens,
            mask,
            _scale(model, args),
            threshold=args.sparc_threshold,
            alignment=args.sparc_alignment,
        )


def _scale(model: Any, args: Namespace) -> Tensor | float:
    return model.logit_scale.exp() if args.sparc_fine_grained_scale is None else args.sparc_fine_grained_scale


def _report(measured: ImageDependence, data: dict[str, Any], epoch: int, args: Namespace, tb_writer: Any) -> None:
    figures = {
        f"{images}_{name}": value
        for images in ("right", "shuffled", "constant")
        for name, value in getattr(measured, images)._asdict().items()
    } | {"chance": measured.chance}
    right, shuffled, constant = measured.right, measured.shuffled, measured.constant
    logging.info(
        f"Image dependence after epoch {epoch}: a token finds its group of patches in {right.token_accuracy:.3f} of "
        f"the cases on its own image, {shuffled.token_accuracy:.3f} on another, {constant.token_accuracy:.3f} on the "
        f"mean of the others, {measured.chance:.3f} by chance; loss {right.loss:.3f}, {shuffled.loss:.3f}, "
        f"{constant.loss:.3f}"
    )
    if args.save_logs:
        path = Path(args.logs, args.name, "image_dependence.jsonl")
        path.parent.mkdir(exist_ok=True, parents=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"epoch": epoch, **figures}) + "\n")
    if tb_writer is not None:
        for name, value in figures.items():
            tb_writer.add_scalar(f"image_dependence/{name}", value, epoch)
    if args.wandb:
        import wandb

        wandb.log(
            {f"image_dependence/{name}": value for name, value in figures.items()}, step=wandb_step(data, epoch, args)
        )
