"""`region_mask`: boxes and masks as the patches that tokens may use."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, Mask

from sparc_loss.regions import region_mask
from sparc_loss.regions.joint_transform import JointTransform, boxes_of


def boxes(*each, size=(64, 64)):
    return BoundingBoxes(torch.tensor(each, dtype=torch.float64), format="XYXY", canvas_size=size)


def drawn(mask, *rows):
    """Whether each row of a mask is the picture given, such as "##.. / ...."."""
    return ["".join("#" if each else "." for each in row) for row in mask.tolist()] == [
        row.replace(" ", "").replace("/", "") for row in rows
    ]


def shares_of_filled_box(box, width, height, crop, flip, grid):
    """The share of each patch that a filled box covers, by a picture of it that is cropped, flipped and divided.

    Every pixel is drawn as rows x columns smaller ones, so that the edges of patches lie between them.
    """
    left, top, right, bottom = box
    picture = np.zeros((height, width))
    picture[top:bottom, left:right] = 1
    first_row, first_column, rows, columns = crop
    picture = picture[first_row : first_row + rows, first_column : first_column + columns]
    picture = picture[:, ::-1] if flip else picture
    picture = np.kron(picture, np.ones(grid))
    return picture.reshape(grid[0], rows, grid[1], columns).mean(axis=(1, 3)).flatten()


@st.composite
def scenes(draw):
    width, height = draw(st.integers(8, 60)), draw(st.integers(8, 60))
    found = []
    for _ in range(draw(st.integers(1, 3))):
        left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        found.append((left, top, draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height))))
    grid = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    return width, height, found, grid, draw(st.booleans()), draw(st.floats(0.05, 1)), draw(st.integers(0, 2**31))


@given(scenes())
def test_equals_a_filled_box_that_is_cropped_and_flipped_with_the_image(scene):
    width, height, found, grid, flip, share, seed = scene
    image = Image.fromarray(np.zeros((height, width, 3), np.uint8))
    transform = v1.Compose(
        [v1.RandomResizedCrop((32, 48), scale=(0.1, 1.0)), v1.RandomHorizontalFlip(float(flip)), v1.ToTensor()]
    )
    torch.manual_seed(seed)
    crop = v1.RandomResizedCrop.get_params(image, scale=(0.1, 1.0), ratio=(3 / 4, 4 / 3))
    torch.manual_seed(seed)
    _, moved = JointTransform(transform)(image, boxes_of(found, image))
    mask = region_mask(moved, [[number] for number in range(len(found))], grid, len(found), share=share)
    for row, box in zip(mask, found, strict=True):
        shares = shares_of_filled_box(box, width, height, crop, flip, grid)
        # Rounding decides for a patch that is covered by exactly the share.
        certain = np.abs(shares - share) > 1e-5
        expected = shares >= share
        if shares.sum() > 0 and not expected.any():
            assert row.sum() == 1
            assert shares[row.nonzero().item()] > 0
        elif shares.sum() == 0:
            assert not row.any()
        else:
            extra = (row.numpy() != expected) & certain
            assert extra.sum() <= 1  # the patch at the centre, which always belongs to it
            assert (row.numpy() | ~expected | ~certain).all()


@given(scenes())
def test_a_box_and_its_filled_mask_give_the_same_patches_but_at_the_centre(scene):
    width, height, found, grid, _, share, _ = scene
    masks = torch.zeros(len(found), height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, found, strict=True):
        mask[top:bottom, left:right] = 255
    positions = [[number] for number in range(len(found))]
    of_masks = region_mask(Mask(masks), positions, grid, len(found), share=share)
    of_boxes = region_mask(boxes(*found, size=(height, width)), positions, grid, len(found), share=share)
    for by_mask, by_box, box in zip(of_masks, of_boxes, found, strict=True):
        shares = shares_of_filled_box(box, width, height, (0, 0, height, width), False, grid)
        assume((np.abs(shares - share) > 1e-5).all())
        assert (by_mask != by_box).sum() <= 2
        assert by_mask.any()
        if (shares >= share).sum() > 0:
            assert torch.equal(by_mask, torch.from_numpy(shares >= share))


def test_patches_are_those_covered_by_half_or_by_the_share_asked_for():
    box = boxes((0, 0, 40, 32))  # half of the third column
    assert drawn(region_mask(box, [[0]], (4, 4), 1), "###. / ###. / .... / ....")
    assert drawn(region_mask(box, [[0]], (4, 4), 1, share=0.51), "##.. / ##.. / .... / ....")
    assert drawn(region_mask(box, [[0]], (2, 2), 1, share=0.25), "## / ..")


def test_a_box_smaller_than_a_patch_keeps_the_patch_of_its_centre():
    assert drawn(region_mask(boxes((17, 33, 19, 35)), [[0]], (4, 4), 1), ".... / .... / .#.. / ....")


def test_a_mask_smaller_than_a_patch_keeps_the_patch_with_most_of_it():
    picture = torch.zeros(1, 64, 64)
    picture[0, 30:35, 60] = 1
    assert drawn(region_mask(Mask(picture), [[0]], (4, 4), 1), ".... / .... / ...# / ....")


def test_a_box_that_was_cropped_away_lets_its_tokens_use_no_patch():
    mask = region_mask(boxes((5, 5, 5, 9)), [[1]], (2, 2), 3)
    assert drawn(mask, "####", "....", "####")
    assert drawn(region_mask(Mask(torch.zeros(1, 8, 8)), [[1]], (2, 2), 3), "####", "....", "####")


def test_words_without_a_box_use_every_patch_or_do_not_count():
    box = boxes((0, 0, 32, 32))
    assert drawn(region_mask(box, [[1]], (2, 2), 3), "####", "#...", "####")
    assert drawn(region_mask(box, [[1]], (2, 2), 3, words="only"), "....", "#...", "....")


def test_a_token_of_several_objects_may_use_each_of_them_and_a_word_may_have_several_tokens():
    found = boxes((0, 0, 32, 32), (32, 32, 64, 64))
    assert drawn(region_mask(found, [[0, 1], [1]], (2, 2), 2), "#...", "#..#")


def test_boxes_of_any_format_are_taken():
    as_centre = BoundingBoxes([[16, 16, 32, 32]], format="CXCYWH", canvas_size=(64, 64))
    assert drawn(region_mask(as_centre, [[0]], (2, 2), 1), "#...")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16])
def test_boxes_are_not_rounded_when_their_format_is_changed(dtype):
    centred = BoundingBoxes(torch.tensor([[40, 32, 15, 5]], dtype=dtype), format="CXCYWH", canvas_size=(64, 64))
    corners = BoundingBoxes([[32.5, 29.5, 47.5, 34.5]], format="XYXY", canvas_size=(64, 64))
    masks = [region_mask(boxes, [[0]], (8, 8), 1) for boxes in (centred, corners)]
    assert torch.equal(*masks)


def test_a_box_outside_the_picture_lets_its_tokens_use_no_patch():
    boxes = BoundingBoxes([[100, 100, 120, 120]], format="XYXY", canvas_size=(64, 64))
    assert not region_mask(boxes, [[0]], (4, 4), 1).any()


@pytest.mark.skipif(not hasattr(BoundingBoxFormat, "XYWHR"), reason="a torchvision without rotated boxes")
def test_rotated_boxes_are_refused():
    boxes = BoundingBoxes([[0.0, 0, 8, 8, 30]], format="XYWHR", canvas_size=(64, 64))
    with pytest.raises(ValueError, match="regions has boxes of the format XYWHR; expected XYXY, XYWH or CXCYWH"):
        region_mask(boxes, [[0]], (4, 4), 1)


@given(st.integers(1, 90), st.integers(1, 12), st.data())
def test_a_patch_that_is_covered_by_exactly_half_belongs_to_the_box_as_to_its_mask(size, number, data):
    patch = data.draw(st.integers(0, number - 1))
    width = size / number
    boxes = BoundingBoxes([[0, (patch + 0.5) * width, 1, size]], format="XYXY", canvas_size=(size, 1))
    assert region_mask(boxes, [[0]], (number, 1), 1)[0, patch]


@pytest.mark.parametrize(
    ("box", "patch"),
    [((193, 193, 206, 206), (6, 6)), ((0, 0, 32, 32), (0, 0)), ((226, 226, 240, 240), None)],
    ids=["in the last patch", "in the first patch", "where no patch is"],
)
def test_patches_lie_where_the_grid_covers_the_image(box, patch):
    """7 patches of 32 pixels in an image of 240, of which 16 pixels are in no patch."""
    expected = torch.zeros(7, 7, dtype=torch.bool)
    if patch:
        expected[patch] = True
    filled = torch.zeros(1, 240, 240)
    filled[0, box[1] : box[3], box[0] : box[2]] = 1
    for regions in (BoundingBoxes([box], format="XYXY", canvas_size=(240, 240)), Mask(filled)):
        found = region_mask(regions, [[0]], (7, 7), 1, extent=(224 / 240, 224 / 240))
        assert torch.equal(found.view(7, 7), expected)


def test_without_objects_every_token_may_use_every_patch():
    assert region_mask(boxes_of([], None), [], (2, 3), 4).all()
    assert not region_mask(boxes_of([], None), [], (2, 3), 4, words="only").any()


def test_moves_with_transforms_of_ones_own():
    box = boxes((0, 0, 16, 16), size=(32, 64))
    flipped = v2.RandomHorizontalFlip(1.0)(box)
    assert drawn(region_mask(flipped, [[0]], (2, 4), 1), "...# / ....")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"regions": torch.zeros(1, 4)}, TypeError, "regions is a Tensor; expected torchvision's tv_tensors.Bounding"),
        ({"positions": []}, ValueError, "positions has 0 entries; expected one for each of 1 regions"),
        ({"positions": [[3]]}, ValueError, "positions has [3]; expected positions from 0 to 2"),
        ({"positions": [[-1]]}, ValueError, "positions has [-1]; expected positions from 0 to 2"),
        ({"grid": (0, 2)}, ValueError, "grid[0] is 0; expected a whole number of at least 1"),
        ({"length": 0}, ValueError, "length is 0; expected a whole number of at least 1"),
        ({"share": 0}, ValueError, "share is 0; expected a number above 0"),
        ({"share": 1.5}, ValueError, "share is 1.5; expected a number between 0 and 1"),
        ({"share": math.nan}, ValueError, "share is nan; expected"),
        ({"words": "none"}, ValueError, "words is 'none'; expected one of 'all', 'only'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused_by_name(change, error, message):
    given = {"regions": boxes((0, 0, 1, 1)), "positions": [[0]], "grid": (2, 2), "length": 3, **change}
    with pytest.raises(error, match=re.escape(message)):
        region_mask(**given)
