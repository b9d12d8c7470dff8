"""An open_clip model as a backbone: the patch embeddings of images, the embeddings of names."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparc_loss import surface_embeddings
from sparc_loss.embeddings.image_size import model_image_size
from sparc_loss.evaluation.encoder import Encoder
from sparc_loss.model_loading import load_model


class Backbone(NamedTuple):
    """A frozen model in evaluation mode.

    Attributes:
        model: surfaced.
        tokenizer: its own.
        width: D of its patch and text embeddings.
        grid: height and width of its grid of patches.
        device: where it is.
    """

    model: Any
    tokenizer: Any
    width: int
    grid: tuple[int, int]
    device: torch.device

    def patches(self, images: Tensor) -> Tensor:
        """Patch embeddings [B, P, D] of images [B, 3, H, W], with gradients where the tower is trained."""
        patches: Tensor = self.model.encode_patches(images.to(self.device))[0]
        return patches

    def names(self, names: Sequence[str]) -> Tensor:
        """Normalised embeddings of names [C, D], without gradients."""
        with torch.no_grad():
            return Encoder(self.model, self.tokenizer, device=self.device).texts(names).to(self.device)


def load_backbone(args: Namespace) -> Backbone:
    """The model of the flags of `sparc_loss.model_loading`, frozen.

    Raises:
        ValueError: a model that cannot be loaded or surfaced, or one whose patches are in no fixed grid.
    """
    model, _, tokenizer = load_model(args)
    try:
        model = surface_embeddings(model, tokenizer).requires_grad_(False).eval()
    except TypeError as error:  # by the name of what is not known
        raise ValueError(str(error)) from error
    with torch.no_grad():
        patches, grid = model.encode_patches(torch.zeros(1, 3, *model_image_size(model.visual), device=args.device))
    if grid is None:
        raise ValueError(f"model {args.model} has patches in no grid; expected a model of images of one size")
    return Backbone(model, tokenizer, patches.shape[-1], grid, torch.device(args.device))
