"""The pointing game: does the patch most similar to a phrase or word lie on the object that it names?

After Zhang et al., "Top-Down Neural Attention by Excitation Backprop" (ECCV 2016, arXiv 1608.00507): a hit is a
maximum that lies on an annotated instance of the object. The annotation is whatever the data has, masks or filled
boxes (`box_masks`); figures on the one are not comparable with figures on the other.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sparc_loss._validation import check_features, check_mask


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


def pointing_game(similarity: Tensor, grid: tuple[int, int], masks: Tensor) -> PointingGame:
    """Play the pointing game: a hit if the centre of the most similar patch lies in the mask.

    The centre is the pixel at (row + 1/2) H/h, (column + 1/2) W/w, rounded down. A tie never counts in favour: where
    several patches share the maximum, all of them must lie in the mask. There is no tolerance margin.

    Args:
        similarity: floating point [N, P], P patches row by row.
        grid: height and width of the patch grid; their product is P.
        masks: bool [N, H, W], the object each map is about.

    Raises:
        TypeError: similarity that is no floating-point tensor, masks that are not bool.
        ValueError: shapes that disagree, values that are not finite.
    """
    check_features("n p", similarity=similarity)
    count, patches = similarity.shape
    height, width = grid
    if height * width != patches:
        raise ValueError(f"grid is {height} x {width} = {height * width}; expected similarity's P = {patches} patches")
    size = masks.shape[-2:] if isinstance(masks, Tensor) and masks.ndim == 3 else ("H", "W")
    check_mask("masks", masks, (count, *size), "n h w", similarity.device)
    if not similarity.isfinite().all():
        raise ValueError("similarity has values that are not finite; expected finite ones")

    inside = _at_centres(masks, height, width)
    is_maximum = similarity == similarity.amax(dim=-1, keepdim=True)
    return PointingGame(
        hits=(inside | ~is_maximum).all(dim=-1), chance=inside.float().mean(dim=-1), reachable=inside.any(dim=-1)
    )


def box_masks(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes as masks, bool [N, height, width].

    Args:
        boxes: [N, 4], left, top, right, bottom in pixels, right and bottom exclusive.
        height: of the image in pixels.
        width: likewise.

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


def _at_centres(masks: Tensor, height: int, width: int) -> Tensor:
    """The masks' values at the centres of an evenly laid grid of patches, bool [N, height * width]."""
    rows = ((torch.arange(height, device=masks.device) + 0.5) * masks.shape[1] / height).long()
    columns = ((torch.arange(width, device=masks.device) + 0.5) * masks.shape[2] / width).long()
    return masks[:, rows][:, :, columns].flatten(start_dim=1)
