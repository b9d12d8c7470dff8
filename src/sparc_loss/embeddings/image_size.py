"""Images of another size than the model's: its position embeddings interpolated as open_clip and timm do."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from open_clip.utils import to_2tuple
from timm.models import ConvNeXt, Eva, FastVit
from timm.models import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from sparc_loss.embeddings.towers import tower_name


@contextmanager
def at_image_size(visual: Any, size: tuple[int, int] | None) -> Iterator[None]:
    """Within the context, the tower takes images of `size`; its position embeddings are constants then.

    Args:
        visual: the vision tower of an open_clip model.
        size: height and width of the images in pixels; None of NaFlex patches, which have none.

    Raises:
        ValueError: a tower that takes images of one size only, by name.
    """
    if size is None:
        yield
        return
    check_image_size(visual, size)
    if isinstance(visual, VisionTransformer):
        own = visual.positional_embedding
        grid = (size[0] // visual.patch_size[0], size[1] // visual.patch_size[1])
        if grid == tuple(visual.grid_size):
            yield
            return
        visual.positional_embedding = nn.Parameter(_interpolated(own, visual.grid_size, grid), requires_grad=False)
        try:
            yield
        finally:
            visual.positional_embedding = own
    elif _resizable(visual) and size != model_image_size(visual):
        trunk, own_size, own = visual.trunk, model_image_size(visual), visual.trunk.pos_embed
        # timm makes those of rotary embeddings anew: within inference mode, no training could use them.
        buffers = [(part, name, each) for part in trunk.modules() for name, each in part.named_buffers(recurse=False)]
        trunk.set_input_size(img_size=size)
        try:
            yield
        finally:
            trunk.set_input_size(img_size=own_size)
            trunk.pos_embed = own
            for part, name, buffer in buffers:
                setattr(part, name, buffer)
    else:
        yield


def model_image_size(visual: Any) -> tuple[int, int]:
    """Height and width of the images that the tower was built for."""
    embedding = getattr(getattr(visual, "trunk", None), "patch_embed", None)
    height, width = to_2tuple(getattr(embedding, "img_size", None) or visual.image_size)
    return height, width


def check_image_size(visual: Any, size: tuple[int, int]) -> None:
    """Raise ValueError for an image without a patch, and, by name, for a tower that takes another size only."""
    trunk = getattr(visual, "trunk", visual)
    if isinstance(visual, VisionTransformer) or _resizable(visual):
        height, width = to_2tuple(getattr(trunk, "patch_embed", trunk).patch_size)
        if size[0] < height or size[1] < width:
            raise ValueError(
                f"images are {size[0]} x {size[1]} pixels; expected at least one patch, {height} x {width}"
            )
        return
    if isinstance(trunk, (ConvNeXt, FastVit)):
        return
    own = model_image_size(visual)
    if tuple(size) != own:
        raise ValueError(
            f"model.visual is a {tower_name(visual)}, which takes images of {own[0]} x {own[1]} pixels only; found "
            f"{size[0]} x {size[1]}"
        )


def _resizable(visual: Any) -> bool:
    return (
        isinstance(visual, TimmModel)
        and isinstance(visual.trunk, (TimmVisionTransformer, Eva))
        and hasattr(visual.trunk.patch_embed, "set_input_size")
    )


def _interpolated(embedding: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Position embeddings [1 + P, C] of a class token and a grid, for another grid (open_clip, resize_pos_embed)."""
    of_class, of_patches = embedding[:1].detach(), embedding[1:].detach()
    maps = rearrange(of_patches, "(h w) c -> 1 c h w", h=grid[0])
    dtype = maps.dtype
    maps = F.interpolate(maps.float(), size=new_grid, mode="bicubic", antialias=True, align_corners=False).to(dtype)
    return torch.cat((of_class, rearrange(maps, "1 c h w -> (h w) c")))
