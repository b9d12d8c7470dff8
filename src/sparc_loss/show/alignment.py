"""The patches that each word of a caption selects: the loss's alignment weights (Eqs. 2-4), word by word."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from sparc_loss.embeddings.modes import evaluation_mode
from sparc_loss.embeddings.reading_names import Reading
from sparc_loss.embeddings.surface import Surfaced, restore, surface_embeddings
from sparc_loss.embeddings.vision import patch_size
from sparc_loss.embeddings.words import Caption, read_caption, word_positions
from sparc_loss.evaluation import dataset
from sparc_loss.functional import Alignment, alignment_weights, token_patch_similarity
from sparc_loss.named_objects import Box, NamedObject
from sparc_loss.regions.joint_transform import JointTransform, boxes_of


@dataclass(frozen=True)
class AlignedPair:
    """An image, a caption, and the weight of every patch for every word that the model reads.

    Attributes:
        caption: with its words.
        pixels: uint8 [H, W, 3], the image as the model sees it: resized and cropped.
        weights: float32 [words, h, w] on the CPU, for `caption.read` in their order; those of a word sum to 1. A word
            of several pieces has the mean of their weights, so it keeps every patch that one of them keeps.
        patch_size: height and width of a patch in pixels. The grid begins at the top left corner; pixels right of it
            and below are in no patch, and the last patches may reach beyond the image.
        title: of the pair, "" for none.
        boxes: of annotated objects, (left, top, right, bottom) in `pixels`, each with the words of `caption.read` that
            name it. Objects that are not in the picture as the model sees it are left out.
    """

    caption: Caption
    pixels: np.ndarray
    weights: Tensor
    patch_size: tuple[float, float]
    title: str = ""
    boxes: tuple[tuple[Box, tuple[int, ...]], ...] = ()

    @property
    def kept(self) -> Tensor:
        """The share of patches that each word keeps, those of a weight above 0: float32 [words]."""
        return (self.weights > 0).float().mean(dim=(1, 2))


def align(
    image: Image.Image | str | Path,
    caption: str,
    model: Any,
    preprocess: Callable[[Image.Image], Tensor],
    tokenizer: Any,
    *,
    threshold: float | None = None,
    alignment: Alignment = "sparse",
    reading: Reading = "last",
    title: str = "",
    objects: Sequence[NamedObject] = (),
) -> AlignedPair:
    """Align the words of a caption with the patches of an image, as the loss does.

    The model is left as it was, surfaced or not, in training mode or not; it is run in evaluation mode, where it is.

    Args:
        image: a PIL image, or the path of a file.
        caption: at least one word.
        model: any that `surface_embeddings` takes.
        preprocess: of evaluation, as `open_clip.create_model_and_transforms` returns it last.
        tokenizer: the model's own, from `open_clip.get_tokenizer`.
        threshold: sigma of Eq. 3, in [0, 1]; None is 1/P.
        alignment: "sparse", "dense" or "softmax", see `functional.alignment_weights`.
        reading: what a ViT's last block gives as patches, see `sparc_loss.embeddings.readings`; "last" is what the
            loss trains.
        title: of the pair, for a figure or a page.
        objects: that the caption names, with their boxes in pixels of the file, to be drawn as well.

    Raises:
        TypeError: a model, preprocess or tokenizer that is not known, a tower for which the reading has no meaning.
        ValueError: an image that cannot be read, a caption without words, a wrong threshold, alignment or reading;
            objects with a preprocess that boxes cannot follow.
    """
    words, image = read_caption(caption, tokenizer), read_image(image)
    pixels = preprocess(image)
    with torch.no_grad(), _ready(model, tokenizer):
        # The first layer is in the precision of the input: a convolution, or NaFlex's linear layer.
        layers = (module for module in model.visual.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))
        stem = next(layers).weight
        images = pixels.unsqueeze(0).to(stem.device, stem.dtype)
        patch_features, grid = model.encode_patches(images, reading=reading)
        token_features, _ = model.encode_tokens(tokenizer([caption]).to(stem.device))
        weights = alignment_weights(token_patch_similarity(token_features, patch_features), threshold, alignment)[0]
    weights = torch.stack([weights[list(word.positions)].mean(dim=0) for word in words.read]).float().cpu()
    if not weights.isfinite().all():
        raise ValueError("model gives weights that are not finite for this pair; expected a model without NaN")
    return AlignedPair(
        words,
        _as_seen(pixels, preprocess),
        rearrange(weights, "l (h w) -> l h w", h=grid[0]),
        patch_size(model.visual, (images.shape[-2], images.shape[-1]), grid),
        title,
        _boxes_as_seen(objects, image, preprocess, words, word_positions(tokenizer, caption)) if objects else (),
    )


def _boxes_as_seen(
    objects: Sequence[NamedObject],
    image: Image.Image,
    preprocess: Any,
    caption: Caption,
    positions: Sequence[Sequence[int]],
) -> tuple[tuple[Box, tuple[int, ...]], ...]:
    """See `AlignedPair.boxes`; `positions` are those of the tokens of `caption.split()`."""
    _, moved = JointTransform(preprocess)(image, boxes_of([each.box for each in objects], image))
    seen = []
    for each, box in zip(objects, moved.tolist(), strict=True):
        left, top, right, bottom = box
        tokens = {place for word in each.words for place in positions[word]}
        words = tuple(index for index, word in enumerate(caption.read) if tokens & set(word.positions))
        if left < right and top < bottom:
            seen.append(((left, top, right, bottom), words))
    return tuple(seen)


def read_image(image: Image.Image | str | Path) -> Image.Image:
    """Open an image file, or take an image that is open.

    Raises:
        ValueError: a file that does not exist or is not a readable image.
    """
    return image if isinstance(image, Image.Image) else dataset.read_image(Path(image))


@contextmanager
def _ready(model: Any, tokenizer: Any) -> Iterator[None]:
    """Surface the model in evaluation mode; on exit, restore it and the mode of each module."""
    was_surfaced = isinstance(model, Surfaced)
    if not was_surfaced:
        surface_embeddings(model, tokenizer)
    try:
        with evaluation_mode(model):
            yield
    finally:
        if not was_surfaced:
            restore(model)


def _as_seen(pixels: Tensor, preprocess: Any) -> np.ndarray:
    """`pixels` [3, H, W] before the normalisation that ends `preprocess`, uint8 [H, W, 3]."""
    transforms = getattr(preprocess, "transforms", None)
    if transforms is None:
        raise TypeError(
            f"preprocess is a {type(preprocess).__name__}; expected the torchvision Compose that "
            "open_clip.create_model_and_transforms returns last"
        )
    pixels = pixels.float()
    for transform in transforms:
        if hasattr(transform, "mean") and hasattr(transform, "std"):
            mean, std = (torch.as_tensor(values).reshape(-1, 1, 1) for values in (transform.mean, transform.std))
            pixels = pixels * std + mean
    return rearrange((pixels * 255).round().clamp(0, 255).byte(), "c h w -> h w c").numpy()
