"""Zero-shot segmentation in sliding windows, as the published protocols have it (SCLIP, arXiv 2312.01597, Section 4).

A window gives a cosine for each patch and each name, which is upsampled to the window's pixels. Where windows overlap,
cosines are averaged. They are upsampled to the pixels of the file, and each pixel takes the class of its best name.

Names are taken in blocks, so that memory depends on the image and not on the number of names.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sparc_loss.evaluation.segmentation import BACKGROUND, upsample

# Of the cosines of a block of names, at the size of the image: 64 MB.
_BLOCK = 1 << 24


class Windows(NamedTuple):
    """Windows of one size over a resized image.

    Attributes:
        corners: row and column of the top left pixel of each.
        size: height and width of each.
        image_size: height and width of the image.
    """

    corners: list[tuple[int, int]]
    size: tuple[int, int]
    image_size: tuple[int, int]

    def cut(self, image: Tensor) -> Tensor:
        """The windows [N, C, h, w] of an image [C, H, W]."""
        height, width = self.size
        return torch.stack([image[:, top : top + height, left : left + width] for top, left in self.corners])


def windows_over(image_size: tuple[int, int], window: int, stride: int) -> Windows:
    """Windows that cover an image; the last ones end at its border, as mmsegmentation's do.

    Args:
        image_size: height and width of the image in pixels.
        window: height and width of a window; a smaller image is one smaller window; 0 is the whole image.
        stride: pixels from one window to the next.
    """
    rows, columns = (_starts(side, window or side, stride) for side in image_size)
    height, width = (min(side, window or side) for side in image_size)
    return Windows([(top, left) for top in rows for left in columns], (height, width), image_size)


def segment_windows(
    patch_features: Tensor,
    name_features: Tensor,
    labels: Tensor,
    windows: Windows,
    grid: tuple[int, int],
    size: tuple[int, int],
    *,
    logit_scale: float = 50.0,
    background_threshold: float = 0.0,
    minimal_area: float = 0.0,
    extent: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """The class of each pixel of an image.

    Args:
        patch_features: floating point [N, P, D], of N windows, row by row, normalised or not.
        name_features: floating point [Q, D], of the names of all classes, normalised or not.
        labels: int64 [Q], the class of each name, or BACKGROUND.
        windows: where the N windows lie on the resized image.
        grid: height and width of a window's patch grid; their product is P.
        size: height and width of the file's image.
        logit_scale: factor of the cosines before the softmax over the names.
        background_threshold: probability of the best name below which a pixel is background.
        minimal_area: a class with no larger share of the pixels that have a class is taken out of the image: its
            pixels take the best of the other names.
        extent: the share of a window's height and width that the grid covers, as in `pointing_game`.

    Returns:
        int64 [H, W], classes or BACKGROUND. Of names that are equally near, the first wins.

    Raises:
        ValueError: features that are not finite.
    """
    for argument, features in (("patch_features", patch_features), ("name_features", name_features)):
        if not features.isfinite().all():
            raise ValueError(f"{argument} has values that are not finite; expected finite ones")
    patches = F.normalize(patch_features, dim=-1)
    names = F.normalize(name_features, dim=-1)
    kept = torch.ones(len(names), dtype=torch.bool, device=names.device)
    scale = logit_scale if background_threshold > 0 or minimal_area > 0 else None
    cosine, best, total = _best_names(patches, names, kept, scale, windows, grid, size, extent)
    if minimal_area > 0:
        found = labels[best]
        areas = torch.bincount(found[found != BACKGROUND], minlength=int(labels.max()) + 1)
        small = (areas <= minimal_area * areas.sum()).nonzero().flatten()
        kept = ~torch.isin(labels, small)
        cosine, best, _ = _best_names(patches, names, kept, None, windows, grid, size, extent)
    segmented = labels[best]
    if scale is not None:
        # Where no name is left, the cosine is -inf and the probability 0.
        probability = (logit_scale * cosine - total).exp()
        unlikely = (probability < background_threshold) | (cosine == -torch.inf)
        segmented = segmented.masked_fill(unlikely, BACKGROUND)
    return segmented


def pixel_cosines(
    patches: Tensor,
    names: Tensor,
    windows: Windows,
    grid: tuple[int, int],
    size: tuple[int, int],
    extent: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """The cosines of an image's pixels with names, averaged over the windows: [Q, H, W].

    Args:
        patches: [N, P, D], of length 1.
        names: [Q, D], of length 1.
        windows: where the N windows lie.
        grid: height and width of a window's patch grid.
        size: height and width of the result, that of the file's image.
        extent: as in `segment_windows`.
    """
    height, width = windows.size
    total = patches.new_zeros(len(names), *windows.image_size)
    count = patches.new_zeros(windows.image_size)
    for (top, left), of_window in zip(windows.corners, patches, strict=True):
        maps = rearrange(of_window @ names.T, "(h w) q -> 1 q h w", h=grid[0])
        rows, columns = slice(top, top + height), slice(left, left + width)
        total[:, rows, columns] += upsample(maps, windows.size, extent)[0]
        count[rows, columns] += 1
    total /= count
    return total if tuple(size) == windows.image_size else upsample(total[None], size)[0]


def _best_names(
    patches: Tensor,
    names: Tensor,
    kept: Tensor,
    scale: float | None,
    windows: Windows,
    grid: tuple[int, int],
    size: tuple[int, int],
    extent: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Per pixel, the highest cosine of the kept names, that name, and, with a scale, the log-sum-exp of all names."""
    pixels = max(size[0] * size[1], windows.image_size[0] * windows.image_size[1])
    block = max(1, _BLOCK // pixels)
    cosine = patches.new_full(size, -torch.inf)
    total = patches.new_full(size, -torch.inf)
    best = torch.zeros(size, dtype=torch.long, device=patches.device)
    for start in range(0, len(names), block):
        cosines = pixel_cosines(patches, names[start : start + block], windows, grid, size, extent)
        if scale is not None:
            total = torch.logaddexp(total, (scale * cosines).logsumexp(dim=0))
        highest, name = cosines.masked_fill_(~kept[start : start + block, None, None], -torch.inf).max(dim=0)
        better = highest > cosine
        cosine, best = torch.where(better, highest, cosine), torch.where(better, name + start, best)
    return cosine, best, total


def _starts(side: int, window: int, stride: int) -> list[int]:
    last = max(side - window, 0)
    return [min(start, last) for start in range(0, last + stride, stride)]
