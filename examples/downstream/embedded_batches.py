"""The images of every step as patch embeddings; by a frozen backbone, each image is read and embedded once."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import trange

from sparc_loss.evaluation.image_batches import image_batches

from .backbone import Backbone

# Of embeddings that are kept on the device; where all do not fit, images are read and embedded in every step.
KEPT_BYTES = 2 * 2**30


class EmbeddedBatch(NamedTuple):
    """The images of a step.

    Attributes:
        indices: of the images, B of them.
        patches: [B, P, D], on the backbone's device.
        sizes: height and width of each image in pixels.
    """

    indices: list[int]
    patches: Tensor
    sizes: Sequence[tuple[int, int]]


def embedded_batches(
    backbone: Backbone, paths: Sequence[Path], order: Sequence[int], batch_size: int, workers: int, frozen: bool = True
) -> Iterator[EmbeddedBatch]:
    """The batches of the steps, with gradients where the backbone is not frozen.

    Args:
        backbone: as `load_backbone` gives it.
        paths: of the images.
        order: the indices of the images of all steps, B for each.
        batch_size: B.
        workers: processes that read images.
        frozen: the backbone stays as it is from step to step.
    """
    distinct = list(dict.fromkeys(order))
    height, width = backbone.grid
    bytes_of_all = len(distinct) * height * width * backbone.width * 4
    if not frozen or len(distinct) == len(order) or bytes_of_all > KEPT_BYTES:
        yield from _embedded(backbone, paths, order, batch_size, workers)
        return
    kept: dict[int, tuple[Tensor, tuple[int, int]]] = {}
    with torch.no_grad():
        for batch in _embedded(backbone, paths, distinct, batch_size, workers):
            kept |= dict(zip(batch.indices, zip(batch.patches, batch.sizes, strict=True), strict=True))
    for start in trange(0, len(order), batch_size, desc="steps", unit="step"):
        indices = list(order[start : start + batch_size])
        patches, sizes = zip(*(kept[index] for index in indices), strict=True)
        yield EmbeddedBatch(indices, torch.stack(patches), sizes)


def _embedded(
    backbone: Backbone, paths: Sequence[Path], order: Sequence[int], batch_size: int, workers: int
) -> Iterator[EmbeddedBatch]:
    for batch in image_batches(backbone.model, paths, batch_size, workers, own=False, order=order):
        assert batch.whole is not None
        yield EmbeddedBatch(batch.indices, backbone.patches(batch.whole), batch.sizes)
