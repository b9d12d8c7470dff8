"""The mean IoU of a model on a data set, in sliding windows, by a protocol. Importing this imports open_clip."""

from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sparc_loss.embeddings.image_size import check_image_size
from sparc_loss.embeddings.readings import check_reading
from sparc_loss.embeddings.vision import patch_extent
from sparc_loss.evaluation.dataset import IGNORED, DataError, EvaluationData, read_image_size, read_mask
from sparc_loss.evaluation.encoder import Encoder
from sparc_loss.evaluation.evaluate import Measure, Options
from sparc_loss.evaluation.image_batches import resized_images, worker_errors
from sparc_loss.evaluation.protocol import Protocol
from sparc_loss.evaluation.segmentation import (
    BACKGROUND,
    intersection_and_union,
    mean_iou,
    random_intersection_and_union,
)
from sparc_loss.evaluation.windows import segment_windows, windows_over


@torch.inference_mode()
def evaluate_windows(
    model: nn.Module, tokenizer: Any, data: EvaluationData, protocol: Protocol, options: Options | None = None
) -> tuple[Measure, dict[str, float]]:
    """Segment the images of a data set and compare them with their masks.

    Args:
        model: surfaced by `surface_embeddings`, with the `preprocess_cfg` that open_clip gives it; set to eval mode.
        tokenizer: the model's own.
        data: with masks, which `check_masks` has found whole.
        protocol: how to segment. Its classes are those of the data, in their order.
        options: batch size (in windows), workers, device and precision; None is the defaults.

    Returns:
        The mean IoU, its chance level, and the number of classes that occur; its ceiling is None, as it depends on
        windows.
        The IoU of each class that occurs, and of background if it is a class.

    Raises:
        DataError: an image or mask that cannot be read, masks without a pixel of a class, a worker that ended.
        TypeError: a tower for which the reading has no meaning.
        ValueError: a tower that does not take windows of this size, another number of classes.
    """
    options = options or Options()
    count = len(data.classes)
    if len(protocol.classes) != count:
        raise ValueError(f"protocol has {len(protocol.classes)} classes; expected those of the data, {count}")
    model_: Any = model.eval()
    check_tower(model_.visual, protocol)
    settings = (options.batch_size, options.device, options.input_dtype, options.autocast)
    encoder = Encoder(model_, tokenizer, *settings, progress=True)
    # Background first: of equal names the first wins, and in SCLIP's protocol "bed" is also a name of background.
    names = [(name, BACKGROUND) for name in protocol.background]
    names += [(name, label) for label, of_class in enumerate(protocol.classes) for name in of_class]
    templates = protocol.templates or open_clip.OPENAI_IMAGENET_TEMPLATES
    name_features = encoder.classes([name for name, _ in names], templates).to(options.device)
    labels = torch.tensor([label for _, label in names], device=options.device)
    background = data.mask_coding.background
    totals, chance = torch.zeros(2, count + 1, dtype=torch.long), torch.zeros(2, count + 1, dtype=torch.double)
    with worker_errors():
        for image, target in resized_images(model, data, protocol, options.workers):
            present = target.unique()
            offered = torch.ones_like(labels, dtype=torch.bool)
            if protocol.classes_offered == "present":
                offered = torch.isin(labels, present.to(labels.device)) | (labels == BACKGROUND)
            kept = target != IGNORED
            if not kept.any() or not offered.any():
                continue
            predicted = _segment(encoder, image, target, name_features[offered], labels[offered], protocol, options)
            totals += torch.stack(intersection_and_union(predicted[kept], target[kept], count))
            drawn = sorted(set(labels[offered].tolist()) - {BACKGROUND})
            chance += torch.stack(
                random_intersection_and_union(target[kept], count, drawn or None, background=background)
            )
    intersection, union = totals
    if not (union[: None if background else count] > 0).any():
        raise DataError("the masks have no pixel of a class; expected at least one")
    shown = [*data.classes, "background"] if background else data.classes
    of_classes = {
        name: float(both / either)
        for name, both, either in zip(shown, intersection, union, strict=False)
        if either > 0
    }
    value = mean_iou(intersection, union, background=background)
    return Measure("mean_iou", value, mean_iou(*chance, background=background), None, len(of_classes)), of_classes


def check_tower(visual: Any, protocol: Protocol) -> None:
    """Raise TypeError for a tower for which the reading has no meaning, ValueError for a window it does not take."""
    check_reading(visual, protocol.reading)
    if protocol.window:
        check_image_size(visual, (protocol.window, protocol.window))


def check_masks(data: EvaluationData) -> None:
    """Read all masks of a data set.

    Raises:
        DataError: one that cannot be read, has another size than its image, or values that are no class.
    """
    pairs = [(image, mask) for image, mask in zip(data.images, data.masks, strict=True) if mask is not None]
    for image, mask in tqdm(pairs, desc="masks checked", unit="mask"):
        read_mask(mask, read_image_size(image), len(data.classes), data.mask_coding)


def _segment(
    encoder: Encoder,
    image: Tensor,
    target: Tensor,
    name_features: Tensor,
    labels: Tensor,
    protocol: Protocol,
    options: Options,
) -> Tensor:
    height, width = image.shape[-2:]
    windows = windows_over((height, width), protocol.window, protocol.stride)
    cut = windows.cut(image)
    encoded = [
        encoder.patches(cut[start : start + options.batch_size], protocol.reading)
        for start in range(0, len(cut), options.batch_size)
    ]
    grid = encoded[0][1]
    return segment_windows(
        torch.cat([patches for patches, _ in encoded]).to(options.device),
        name_features,
        labels,
        windows,
        grid,
        (target.shape[0], target.shape[1]),
        logit_scale=protocol.logit_scale,
        background_threshold=protocol.background_threshold,
        minimal_area=protocol.minimal_area,
        extent=patch_extent(encoder.model.visual, windows.size, grid),
    ).cpu()
