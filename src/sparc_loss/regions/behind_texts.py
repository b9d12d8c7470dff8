"""Region masks on their way from the data to the model: packed behind the token ids of each text.

open_clip's training moves two tensors to the device, images and texts, and hands them to the model. So the mask of a
text travels in the same row: 64 of its bits are one more integer behind the L token ids. The model takes them off
again and returns them as `region_mask` among its outputs, where SparcLoss finds them. This needs no change to the
training loop, and works with accumulated batches, several processes and worker processes.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sparc_loss.embeddings.image_size import model_image_size
from sparc_loss.embeddings.modes import evaluation_mode
from sparc_loss.embeddings.towers import new_of_class
from sparc_loss.embeddings.vision import patch_extent

_BITS = 64


class RegionSizes(NamedTuple):
    """The sizes of the packed rows.

    Attributes:
        ids: number of token ids of a text, as the tokenizer returns it.
        length: L, of `token_features`.
        grid: rows and columns of the patches.
        extent: the share of the image's height and width that they cover.
    """

    ids: int
    length: int
    grid: tuple[int, int]
    extent: tuple[float, float] = (1.0, 1.0)

    @property
    def patches(self) -> int:
        """P."""
        return self.grid[0] * self.grid[1]

    @property
    def packed(self) -> int:
        """The number of integers of a packed mask."""
        return -(-self.length * self.patches // _BITS)


def sizes_for(model: Any) -> RegionSizes:
    """The sizes of a surfaced model."""
    # The first layer is in the precision of the input.
    stem = next(each for each in model.visual.modules() if isinstance(each, (nn.Conv2d, nn.Linear))).weight
    size = model_image_size(model.visual)
    with torch.no_grad(), evaluation_mode(model):
        _, grid = model.encode_patches(stem.new_zeros(1, 3, *size))
        tokens, _ = model.encode_tokens(torch.zeros(1, model.context_length, dtype=torch.long, device=stem.device))
    return RegionSizes(model.context_length, tokens.shape[1], grid, patch_extent(model.visual, size, grid))


def packed(mask: Tensor) -> Tensor:
    """A bool mask of any shape as int64 [ceil(n / 64)]."""
    # numpy, because a worker process does this for every text; torch needs five times as long.
    octets = np.packbits(mask.numpy().ravel(), bitorder="little")
    whole = np.zeros(-(-mask.numel() // _BITS) * (_BITS // 8), np.uint8)
    whole[: len(octets)] = octets
    return torch.from_numpy(whole.view("<i8").astype(np.int64))


def unpacked(texts: Tensor, sizes: RegionSizes) -> tuple[Tensor, Tensor]:
    """Token ids [B, ids] and region masks, bool [B, L, P], from rows [B, ids + packed]."""
    ids, integers = texts.split([sizes.ids, sizes.packed], dim=1)
    bits = (integers[..., None] >> torch.arange(_BITS, device=texts.device)) & 1
    mask = bits.bool().flatten(1)[:, : sizes.length * sizes.patches]
    return ids, mask.unflatten(1, (sizes.length, sizes.patches))


def take_regions(model: Any, sizes: RegionSizes) -> Any:
    """Let a surfaced model take texts with a packed mask behind them, and return it as `region_mask`; returns it.

    Texts of the usual width stay what they are, and so does everything else.
    """
    model.__class__ = _taking_regions(model.__class__)
    model._region_sizes = sizes
    return model


@functools.cache
def _taking_regions(surfaced: Any) -> type[nn.Module]:
    class TakingRegions(surfaced):
        def forward(self, image: Any = None, text: Tensor | None = None) -> Any:
            sizes: RegionSizes = self._region_sizes
            if text is None or text.shape[1] != sizes.ids + sizes.packed:
                return super().forward(image, text)
            ids, mask = unpacked(text, sizes)
            return {**super().forward(image, ids), "region_mask": mask}

        def __reduce_ex__(self, protocol: Any) -> Any:
            return new_of_class, (_taking_regions, surfaced), *super().__reduce_ex__(protocol)[2:]

    TakingRegions.__name__ = TakingRegions.__qualname__ = f"{surfaced.__name__}TakingRegions"
    return TakingRegions
