"""`region_mask`: boxes or masks of an image as the patches that each token may use."""

from collections.abc import Collection, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from sparc_loss._checks import check_choice, check_number, check_positive, check_whole_number

if TYPE_CHECKING:
    from torchvision.tv_tensors import BoundingBoxes, Mask

RegionWords = Literal["all", "only"]
# A patch that is covered by exactly `share` must not miss it, also by boxes in float32.
_ROUNDING = 1e-5
REGION_WORDS: tuple[RegionWords, ...] = ("all", "only")


def region_mask(
    regions: "BoundingBoxes | Mask",
    positions: Sequence[Sequence[int]],
    grid: tuple[int, int],
    length: int,
    *,
    share: float = 0.5,
    words: RegionWords = "all",
    extent: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """The patches that each token of a caption may use, from the regions of the objects that the tokens name.

    Give it boxes or masks that went through the transforms of their image, as `torchvision.transforms.v2` moves them.
    A region that was cropped away has no pixel left. Its tokens may then use no patch, so that they are not valid: the
    loss leaves them out. A token of several objects may use the regions of each of them.

    A patch belongs to a region that covers at least `share` of its area. The patch at the centre of a box, or with
    most pixels of a mask, always belongs to it, so that a small object keeps a patch.

    Args:
        regions: N boxes, not rotated, or N masks [N, H, W], where a pixel that is not 0 belongs to the object.
        positions: for each of the N objects the positions of its tokens in `token_features`, from 0 up to `length`;
            `sparc_loss.embeddings.words.word_positions` finds those of the words of a caption.
        grid: rows and columns of the patches, as `model.encode_patches` returns them.
        length: L, of `token_features`.
        share: of the area of a patch, above 0 and up to 1.
        words: which words are valid: "all", where those of no object may use every patch, or "only" those of an object
            that is in the picture.
        extent: the share of the image's height and width that the grid covers, from the top left corner, as
            `sparc_loss.embeddings.vision.patch_extent` gives it: not 1 where the size is no multiple of the patch's.

    Returns:
        bool [L, P], row by row of the grid. Stacked over a batch it is the `region_mask` of `SparcLoss`.

    Raises:
        TypeError: regions that are neither BoundingBoxes nor Mask, a number of the wrong type, positions that are not
            a list for each region, a grid or extent that is not a pair.
        ValueError: masks not of rank 3, rotated boxes, a share outside (0, 1], an extent that is not positive, an
            empty grid, an unknown `words`, positions outside the caption or not of as many objects as regions.

    Example:
        >>> from torchvision.tv_tensors import BoundingBoxes
        >>> boxes = BoundingBoxes([[0, 0, 32, 32]], format="XYXY", canvas_size=(64, 64))
        >>> region_mask(boxes, [[1]], grid=(2, 2), length=3).int()
        tensor([[1, 1, 1, 1],
                [1, 0, 0, 0],
                [1, 1, 1, 1]], dtype=torch.int32)
    """
    from torchvision.tv_tensors import BoundingBoxes, Mask

    check_share("share", share)
    check_choice("words", words, REGION_WORDS)
    for name, pair in (("grid", grid), ("extent", extent)):
        if not isinstance(pair, Collection) or len(pair) != 2:
            raise TypeError(f"{name} is {pair!r}; expected two numbers, for the height and for the width")
    for name, size in (("grid[0]", grid[0]), ("grid[1]", grid[1]), ("length", length)):
        check_whole_number(name, size, 1)
    for name, covered in (("extent[0]", extent[0]), ("extent[1]", extent[1])):
        check_positive(name, covered)
    if isinstance(regions, Mask) and regions.ndim != 3:
        raise ValueError(f"regions has shape {list(regions.shape)}; expected masks [N, H, W]")
    if len(positions) != len(regions):
        raise ValueError(f"positions has {len(positions)} entries; expected one for each of {len(regions)} regions")
    for each in positions:
        if not isinstance(each, Collection) or not all(isinstance(position, Integral) for position in each):
            raise TypeError(f"positions has {each!r}; expected a list of whole numbers for each region")
        if not all(0 <= position < length for position in each):
            raise ValueError(f"positions has {list(each)}; expected positions from 0 to {length - 1}")
    if isinstance(regions, BoundingBoxes):
        patches = patches_of_boxes(regions, grid, share, extent)
    elif isinstance(regions, Mask):
        patches = patches_of_masks(regions, grid, share, extent)
    else:
        raise TypeError(
            f"regions is a {type(regions).__name__}; expected torchvision's tv_tensors.BoundingBoxes or Mask"
        )
    usable = np.zeros((length, grid[0] * grid[1]), dtype=bool)
    has_region = np.zeros(length, dtype=bool)
    for patches_of_object, tokens in zip(patches.numpy(), positions, strict=True):
        usable[list(tokens)] |= patches_of_object
        has_region[list(tokens)] = True
    if words == "all":
        usable[~has_region] = True
    return torch.from_numpy(usable)


def check_share(name: str, value: float) -> None:
    """Raise TypeError or ValueError unless the value is a number above 0 and up to 1."""
    check_number(name, value, 0, 1)
    check_positive(name, value)


def patches_of_boxes(
    boxes: "BoundingBoxes", grid: tuple[int, int], share: float, extent: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """The patches of each of N boxes, bool [N, P]; none for a box without area in the picture and its grid."""
    from torchvision.transforms.v2.functional import convert_bounding_box_format
    from torchvision.tv_tensors import BoundingBoxFormat

    straight = (BoundingBoxFormat.XYXY, BoundingBoxFormat.XYWH, BoundingBoxFormat.CXCYWH)
    if boxes.format not in straight:
        raise ValueError(
            f"regions has boxes of the format {boxes.format.name}; expected XYXY, XYWH or CXCYWH, not rotated"
        )
    # In float64 before the format is changed, where whole numbers would be rounded.
    corners = boxes.as_subclass(Tensor).detach().cpu().double()
    if boxes.format != BoundingBoxFormat.XYXY:
        corners = convert_bounding_box_format(corners, old_format=boxes.format, new_format=BoundingBoxFormat.XYXY)
    # numpy, because a worker process does this for every caption; torch needs several times as long.
    left, top, right, bottom = corners.numpy().T
    (height, width), (of_height, of_width) = boxes.canvas_size, extent
    top, bottom = (np.clip(edge, 0, height * min(of_height, 1)) for edge in (top, bottom))
    left, right = (np.clip(edge, 0, width * min(of_width, 1)) for edge in (left, right))
    down, at_row = _overlap(top, bottom, height * of_height, grid[0])
    across, at_column = _overlap(left, right, width * of_width, grid[1])
    covered = down[:, :, None] * across[:, None, :] >= share - _ROUNDING
    is_box = (right > left) & (bottom > top)
    centre = at_row[:, :, None] & at_column[:, None, :]
    found = ((covered | centre) & is_box[:, None, None]).reshape(len(boxes), grid[0] * grid[1])
    return torch.from_numpy(found)


def patches_of_masks(
    masks: "Mask", grid: tuple[int, int], share: float, extent: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """The patches of each of N masks [N, H, W], bool [N, P]; none for a mask without a pixel in the grid."""
    pixels = (masks.as_subclass(Tensor).cpu() != 0).double()
    rows, columns = (
        torch.from_numpy(_pixels_of_patches(size, number, of_size))
        for size, number, of_size in zip(pixels.shape[-2:], grid, extent, strict=True)
    )
    covered = (rows.T @ pixels @ columns).flatten(1)
    most = covered == covered.amax(dim=1, keepdim=True)
    first_of_most = most & (most.cumsum(dim=1) == 1)
    return ((covered >= share - _ROUNDING) | first_of_most) & (covered.sum(dim=1, keepdim=True) > 0)


def _overlap(start: np.ndarray, stop: np.ndarray, size: float, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Which share of each of `number` equal parts of [0, size] lies between start and stop [N]; which has the middle.

    Returns:
        [N, number], and bool [N, number].
    """
    edges = np.arange(number + 1) * (size / number)
    overlap = np.minimum(stop[:, None], edges[1:]) - np.maximum(start[:, None], edges[:-1])
    middle = np.clip(np.floor((start + stop) / 2 * number / size), 0, number - 1)
    return overlap.clip(min=0) * (number / size), middle[:, None] == np.arange(number)


def _pixels_of_patches(size: int, number: int, extent: float) -> np.ndarray:
    """Which share of each patch each pixel is, [size, number]: pixels may lie across two patches."""
    pixels = np.arange(size, dtype=np.float64)
    return _overlap(pixels, pixels + 1, size * extent, number)[0]
