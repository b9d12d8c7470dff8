"""The pointing game, against examples worked by hand."""

import pytest
import torch

from sparc_loss.evaluation import box_masks, pointing_game

# A grid of 2 x 3 patches over 4 x 6 pixels: the centres are the pixels (1, 1) (1, 3) (1, 5) / (3, 1) (3, 3) (3, 5).
GRID, SIZE = (2, 3), (4, 6)


def mask(*pixels: tuple[int, int]) -> torch.Tensor:
    """A mask [1, 4, 6] of the (row, column) pixels."""
    masks = torch.zeros(1, *SIZE, dtype=torch.bool)
    for row, column in pixels:
        masks[0, row, column] = True
    return masks


def similar_to(*patches: int) -> torch.Tensor:
    """A similarity map [1, 6], 1 at the patches, less elsewhere."""
    similarity = torch.linspace(-0.5, 0.5, 6)[None]
    similarity[0, list(patches)] = 1.0
    return similarity


def test_hit_where_the_centre_of_the_best_patch_is_in_the_mask():
    assert pointing_game(similar_to(5), GRID, mask((3, 5))).hits.tolist() == [True]


def test_miss_where_the_mask_touches_the_patch_but_not_its_centre():
    assert pointing_game(similar_to(5), GRID, mask((2, 4), (2, 5), (3, 4))).hits.tolist() == [False]


def test_patches_go_row_by_row():
    assert pointing_game(similar_to(3), GRID, mask((3, 1))).hits.tolist() == [True]


def test_a_tie_partly_off_the_object_misses():
    assert pointing_game(similar_to(0, 1), GRID, mask((1, 1))).hits.tolist() == [False]


def test_a_tie_on_the_object_hits():
    assert pointing_game(similar_to(0, 1), GRID, mask((1, 1), (1, 3))).hits.tolist() == [True]


def test_a_flat_map_misses():
    assert pointing_game(torch.zeros(1, 6), GRID, mask((1, 1))).hits.tolist() == [False]


def test_chance_is_the_share_of_centres_in_the_mask():
    masks = torch.cat([mask((1, 1), (1, 3), (0, 0)), mask()])
    assert pointing_game(torch.randn(2, 6), GRID, masks).chance.tolist() == pytest.approx([1 / 3, 0])


def test_an_object_between_the_centres_is_out_of_reach():
    masks = torch.cat([mask((2, 4), (2, 5)), mask((3, 5)), mask()])
    assert pointing_game(torch.randn(3, 6), GRID, masks).reachable.tolist() == [False, True, False]


def test_random_maps_score_chance():
    masks = torch.rand(4000, 8, 8) < 0.3
    game = pointing_game(torch.randn(4000, 16), (4, 4), masks)
    assert game.hits.float().mean().item() == pytest.approx(game.chance.mean().item(), abs=0.03)


def test_patch_size_need_not_divide_the_image():
    # 2 patches over 5 pixels: centres at 1.25 and 3.75, the pixels 1 and 3.
    masks = torch.tensor([[[False, True, False, True, False]]])
    assert pointing_game(torch.zeros(1, 2), (1, 2), masks).hits.tolist() == [True]


def test_boxes_become_filled_masks():
    masks = box_masks(torch.tensor([[1, 0, 3, 2], [0, 3, 1, 4]]), height=4, width=3)
    assert masks.int().tolist() == [
        [[0, 1, 1], [0, 1, 1], [0, 0, 0], [0, 0, 0]],
        [[0, 0, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]],
    ]


def test_a_grid_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="grid is 2 x 2 = 4; expected similarity's P = 6 patches"):
        pointing_game(torch.zeros(1, 6), (2, 2), mask())


def test_masks_that_are_not_bool_are_refused():
    with pytest.raises(TypeError, match=r"masks has dtype torch\.int64; expected torch\.bool"):
        pointing_game(torch.zeros(1, 6), GRID, mask().long())


def test_a_mask_for_another_number_of_maps_is_refused():
    with pytest.raises(ValueError, match=r"masks has shape \[1, 4, 6\]; expected \[N, H, W\] = \[2, 4, 6\]"):
        pointing_game(torch.zeros(2, 6), GRID, mask())


def test_nan_is_refused():
    with pytest.raises(ValueError, match="similarity has values that are not finite"):
        pointing_game(torch.full((1, 6), torch.nan), GRID, mask())


def test_boxes_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"boxes has shape \[4\]; expected \[N, 4\]"):
        box_masks(torch.zeros(4), 2, 2)
