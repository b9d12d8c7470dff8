"""Where the patches of a grid lie on an image that is no multiple of them, against a slow reference in fractions."""

from fractions import Fraction
from math import ceil, floor
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparc_loss.evaluation import box_masks, majority_segmentation, pointing_game, segment
from sparc_loss.evaluation.patch_grid import nearest_patches, patch_centres


class Side(NamedTuple):
    """One side of an image that was resized to `seen` pixels for a tower of patches of `patch` of these."""

    pixels: int
    seen: int
    patch: int
    patches: int

    @property
    def extent(self) -> float:
        return self.patches * self.patch / self.seen

    def borders(self, index: int) -> tuple[Fraction, Fraction]:
        """Where a patch begins and ends within the image, in the image's pixels."""
        return tuple(
            min(Fraction(edge * self.patch * self.pixels, self.seen), Fraction(self.pixels))
            for edge in (index, index + 1)
        )

    def centre(self, index: int) -> int:
        start, end = self.borders(index)
        return floor((start + end) / 2)

    def patch_of(self, pixel: int) -> int:
        return next((i for i in range(self.patches) if pixel < self.borders(i)[1]), self.patches - 1)


@st.composite
def sides(draw: st.DrawFn) -> Side:
    """Patches that leave pixels out, end with the image, or reach beyond it; no more of them than pixels."""
    patch, patches = draw(st.integers(1, 17)), draw(st.integers(1, 9))
    left_out = draw(st.integers(1 - patch, patch - 1))
    seen = max(patch * patches + left_out, patch * (patches - 1) + 1)
    return Side(draw(st.integers(patches, 120)), seen, patch, patches)


@given(side=sides())
def test_centres_and_nearest_patches_are_exact(side: Side) -> None:
    expected = [min(side.centre(index), side.pixels - 1) for index in range(side.patches)]
    assert patch_centres(side.pixels, side.patches, side.extent).tolist() == expected
    nearest = [side.patch_of(pixel) for pixel in range(side.pixels)]
    assert nearest_patches(side.pixels, side.patches, side.extent).tolist() == nearest


@given(pixels=st.integers(1, 3000), patches=st.integers(1, 80))
def test_a_grid_of_the_whole_image_divides_it_evenly(pixels: int, patches: int) -> None:
    evenly = ((torch.arange(patches) + 0.5) * pixels / patches).long()
    assert torch.equal(patch_centres(pixels, patches), evenly)
    assert torch.equal(nearest_patches(pixels, patches), torch.arange(pixels) * patches // pixels)


@given(high=sides(), wide=sides(), data=st.data())
def test_who_picks_the_patch_of_an_object_hits_it(high: Side, wide: Side, data: st.DataObject) -> None:
    row, column = data.draw(st.integers(0, high.patches - 1)), data.draw(st.integers(0, wide.patches - 1))
    box = [edge for pair in zip(wide.borders(column), high.borders(row), strict=True) for edge in pair]
    left, right, top, bottom = floor(box[0]), ceil(box[2]), floor(box[1]), ceil(box[3])
    mask = box_masks(torch.tensor([[left, top, right, bottom]]), high.pixels, wide.pixels)
    similarity = torch.zeros(1, high.patches * wide.patches)
    similarity[0, row * wide.patches + column] = 1
    game = pointing_game(similarity, (high.patches, wide.patches), mask, (high.extent, wide.extent))
    assert game.hits.tolist() == game.reachable.tolist() == [True]


@given(high=sides(), wide=sides(), seed=st.integers(0, 2**32))
def test_a_label_for_each_patch_is_its_own_majority(high: Side, wide: Side, seed: int) -> None:
    grid, generator = (high.patches, wide.patches), torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, grid, generator=generator)
    rows = [high.patch_of(pixel) for pixel in range(high.pixels)]
    columns = [wide.patch_of(pixel) for pixel in range(wide.pixels)]
    target = labels[rows][:, columns]
    best = majority_segmentation(target, grid, 5, extent=(high.extent, wide.extent))
    assert torch.equal(best, target)


def interpolated(side: Side, pixel: int) -> torch.Tensor:
    """The weights of the patches at a pixel's centre, [patches]: linear between centres, constant beyond."""
    place = Fraction(2 * pixel + 1, 2) * side.seen / (side.pixels * side.patch) - Fraction(1, 2)
    place = min(max(place, Fraction(0)), Fraction(side.patches - 1))
    weights = torch.zeros(side.patches)
    weights[floor(place)] = float(1 - (place - floor(place)))
    weights[ceil(place)] += float(place - floor(place))
    return weights


@given(high=sides(), wide=sides(), seed=st.integers(0, 2**32))
def test_cosines_are_interpolated_between_the_patches_where_they_lie(high: Side, wide: Side, seed: int) -> None:
    grid, generator = (high.patches, wide.patches), torch.Generator().manual_seed(seed)
    patches = torch.nn.functional.normalize(torch.randn(*grid, 4, generator=generator), dim=-1)
    _, scores = segment(
        patches.flatten(0, 1), torch.eye(4)[:1], grid, (high.pixels, wide.pixels), extent=(high.extent, wide.extent)
    )
    rows = torch.stack([interpolated(high, pixel) for pixel in range(high.pixels)])
    columns = torch.stack([interpolated(wide, pixel) for pixel in range(wide.pixels)])
    torch.testing.assert_close(scores, rows @ patches[..., 0] @ columns.T, atol=1e-4, rtol=0)


@pytest.mark.parametrize("extent", [(0, 1), (1, -0.5), (float("nan"), 1), (1, float("inf"))])
def test_an_extent_that_is_no_share_is_refused(extent: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"extent is .*; expected a"):
        pointing_game(torch.zeros(1, 4), (2, 2), torch.ones(1, 4, 4, dtype=torch.bool), extent)
    with pytest.raises(ValueError, match=r"extent is .*; expected a"):
        majority_segmentation(torch.zeros(4, 4, dtype=torch.long), (2, 2), 1, extent=extent)
    with pytest.raises(ValueError, match=r"extent is .*; expected a"):
        segment(torch.ones(4, 3), torch.eye(3), (2, 2), (4, 4), extent=extent)


def test_an_extent_that_is_no_number_is_refused() -> None:
    with pytest.raises(TypeError, match=r"extent is .1. \(str\); expected a number"):
        pointing_game(torch.zeros(1, 4), (2, 2), torch.ones(1, 4, 4, dtype=torch.bool), ("1", 1))
