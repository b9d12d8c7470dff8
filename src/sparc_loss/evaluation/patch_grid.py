"""Where the patches of a grid lie on an image, along one side of both.

`extent` is the share of the side that the grid covers, from its beginning. The arithmetic uses whole
numbers, so that rounding does not move a centre on the border of two pixels.
"""

from fractions import Fraction

import torch
from torch import Tensor

from sparc_loss._checks import check_number

# Extents are quotients of no larger whole numbers than this.
_PRECISION = 1 << 16


def patch_centres(pixels: int, patches: int, extent: float = 1.0) -> Tensor:
    """The pixel at the centre of each patch, or of the part of it that lies within the image: int64 [patches].

    Raises:
        TypeError: an extent that is not a number.
        ValueError: an extent that is not finite, or not above 0.
    """
    patch, pixel = _units(pixels, patches, extent)
    starts = torch.arange(patches) * patch
    ends = (starts + patch).clamp(max=pixels * pixel)
    return (starts + ends).div(2 * pixel, rounding_mode="floor").clamp(max=pixels - 1)


def nearest_patches(pixels: int, patches: int, extent: float = 1.0) -> Tensor:
    """The patch in which each pixel begins, the last one for pixels beyond the grid: int64 [pixels].

    Errors as in `patch_centres`.
    """
    patch, pixel = _units(pixels, patches, extent)
    return (torch.arange(pixels) * pixel).div(patch, rounding_mode="floor").clamp(max=patches - 1)


def check_extent(extent: float) -> None:
    """Raise TypeError unless `extent` is a number, ValueError unless it is finite, above 0 and of a plausible size."""
    check_number("extent", extent, 1 / _PRECISION, _PRECISION)


def _units(pixels: int, patches: int, extent: float) -> tuple[int, int]:
    """The length of a patch and of a pixel in a unit of which both are whole multiples."""
    check_extent(extent)
    # The quotient of two numbers of pixels, whatever its last bit was rounded to.
    share = Fraction(extent).limit_denominator(_PRECISION)
    return pixels * share.numerator, patches * share.denominator
