"""The pointing game: does the patch most similar to a phrase or word lie on the object that it names?

After Zhang et al., "Top-Down Neural Attention by Excitation Backprop" (ECCV 2016, arXiv 1608.00507): a hit is a
maximum that lies on an annotated instance of the object. The annotations are masks or filled boxes (`box_masks`);
figures on masks are not comparable with figures on boxes.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparc_loss._checks import check_features, check_mask
from sparc_loss.evaluation.patch_grid import patch_centres


class PointingGame(NamedTuple):
    """The outcome per similarity map; the means over N are accuracy, chance level and ceiling.

    Attributes:
        hits: bool [N].
        chance: float32 [N], the hit rate of a patch drawn at random.
        reachable: bool [N], whether the centre of any patch lies in the mask: an object between the centres cannot
            be hit.
    """

    hits: Tensor
    chance: Tensor
    reachable: Tensor


def pointing_game(
    similarity: Tensor, grid: tuple[int, int], masks: Tensor, extent: tuple[float, float] = (1.0, 1.0)
) -> PointingGame:
    """Play the pointing game: a hit if the centre of the most similar patch lies in the mask.

    The centre is the pixel at (row + 1/2) H/h, (column + 1/2) W/w, rounded down. If several
    patches share the maximum, all of them must lie in the mask. There is no tolerance margin.

    Args:
        similarity: floating point [N, P], P patches row by row.
        grid: height and width of the patch grid; their product is P.
        masks: bool [N, H, W], the object each map is about.
        extent: the share of the image's height and width that the grid covers, from the top left corner. A ViT of
            patch 14 covers 378 of 384 pixels: 378 / 384. It is above 1 where the last patches reach beyond the image;
            their centre is then that of the part within.

    Raises:
        TypeError: similarity not floating point, masks not bool, an extent that is not a number.
        ValueError: shapes that disagree, values that are not finite, an extent that is not above 0.
    """
    check_features("n p", similarity=similarity)
    count, patches = similarity.shape
    height, width = grid
    if height * width != patches:
        raise ValueError(f"grid is {height} x {width} = {height * width}; expected similarity's P = {patches} patches")
    size: Any = masks.shape[-2:] if isinstance(masks, Tensor) and masks.ndim == 3 else ("H", "W")
    check_mask("masks", masks, (count, *size), "n h w", similarity.device)
    if not similarity.isfinite().all():
        raise ValueError("similarity has values that are not finite; expected finite ones")

    rows, columns = (
        patch_centres(pixels, patches, share).to(masks.device)
        for pixels, patches, share in zip(size, grid, extent, strict=True)
    )
    inside = masks[:, rows][:, :, columns].flatten(start_dim=1)
    is_maximum = similarity == similarity.amax(dim=-1, keepdim=True)
    return PointingGame(
        hits=(inside | ~is_maximum).all(dim=-1), chance=inside.float().mean(dim=-1), reachable=inside.any(dim=-1)
    )


def box_masks(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes as masks, bool [N, height, width].

    Args:
        boxes: [N, 4], left, top, right, bottom in pixels, right and bottom exclusive.
        height: of the image in pixels.
        width: of the image in pixels.

    Raises:
        ValueError: boxes of another shape.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes has shape {list(boxes.shape)}; expected [N, 4], left, top, right, bottom")
    left, top, right, bottom = boxes[:, :, None].unbind(dim=1)
    rows = torch.arange(height, device=boxes.device)
    columns = torch.arange(width, device=boxes.device)
    in_rows = (rows >= top) & (rows < bottom)
    in_columns = (columns >= left) & (columns < right)
    return in_rows[:, :, None] & in_columns[:, None, :]
