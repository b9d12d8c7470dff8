"""Zero-shot segmentation and its mean intersection over union, against examples worked by hand."""

import math
from collections import Counter, defaultdict

import pytest
import torch

from sparc_loss.evaluation import (
    BACKGROUND,
    intersection_and_union,
    majority_segmentation,
    mean_iou,
    random_intersection_and_union,
    segment,
)

# Three classes, each an axis of the space.
CLASSES = torch.eye(3)


def patches(*classes: int) -> torch.Tensor:
    """Patch embeddings that point to the classes, of various lengths."""
    return CLASSES[list(classes)] * torch.arange(1, len(classes) + 1)[:, None]


def test_each_patch_takes_its_class_at_its_own_resolution():
    labels, scores = segment(patches(0, 2, 1, 1), CLASSES, (2, 2), (2, 2))
    assert labels.tolist() == [[0, 2], [1, 1]]
    assert scores.tolist() == [[1, 1], [1, 1]]


def test_cosines_are_upsampled_not_labels():
    # Bilinear: the second pixel lies at 1/4 of the way, cosines (.75, .25); the third at 3/4.
    labels, scores = segment(patches(0, 1), CLASSES, (1, 2), (1, 4))
    assert labels.tolist() == [[0, 0, 1, 1]]
    assert scores[0].tolist() == pytest.approx([1, 0.75, 0.75, 1])


def test_only_classes_present_are_given():
    labels, _ = segment(patches(0, 1, 2), CLASSES, (1, 3), (1, 3), present=[1, 2])
    assert labels[0, 1:].tolist() == [1, 2]
    assert labels[0, 0] in (1, 2)


def test_pixels_that_resemble_no_class_are_background():
    features = torch.stack([CLASSES[0], -CLASSES[1]])
    labels, _ = segment(features, CLASSES[:2], (1, 2), (1, 2), background_threshold=0.5)
    assert labels.tolist() == [[0, BACKGROUND]]


def test_a_cosine_of_just_the_threshold_is_no_background():
    labels, _ = segment(CLASSES[:1], CLASSES, (1, 1), (1, 1), background_threshold=1.0)
    assert labels.tolist() == [[0]]


def test_a_threshold_can_be_set_afterwards():
    features = torch.randn(16, 3)
    labels, scores = segment(features, CLASSES, (4, 4), (8, 8))
    later = labels.masked_fill(scores < 0.4, BACKGROUND)
    assert torch.equal(later, segment(features, CLASSES, (4, 4), (8, 8), background_threshold=0.4).labels)


def test_intersection_and_union_by_hand():
    labels = torch.tensor([[0, 0, 1], [BACKGROUND, 1, 1]])
    target = torch.tensor([[0, 1, 1], [BACKGROUND, BACKGROUND, 1]])
    intersection, union = intersection_and_union(labels, target, num_classes=3)
    assert intersection.tolist() == [1, 2, 0, 1]
    assert union.tolist() == [2, 4, 0, 2]


def test_ignored_pixels_count_nowhere():
    labels, target = torch.tensor([0, 1, 1]), torch.tensor([0, 255, 1])
    intersection, union = intersection_and_union(labels, target, num_classes=2, ignore=255)
    assert intersection.tolist() == union.tolist() == [1, 1, 0]


def test_mean_leaves_out_classes_that_occur_nowhere():
    intersection, union = torch.tensor([1, 2, 0, 1]), torch.tensor([2, 4, 0, 4])
    assert mean_iou(intersection, union) == 0.5
    assert mean_iou(intersection, union, background=True) == pytest.approx((0.5 + 0.5 + 0.25) / 3)


def test_a_class_predicted_but_absent_lowers_the_mean():
    intersection, union = intersection_and_union(torch.tensor([0, 1]), torch.tensor([0, 0]), num_classes=2)
    assert mean_iou(intersection, union) == 0.25


def test_no_class_at_all_has_no_mean():
    assert math.isnan(mean_iou(torch.zeros(3), torch.zeros(3)))


def test_agrees_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    labels, target = torch.randint(0, 5, (2, 400))
    expected = metrics.jaccard_score(target, labels, average="macro")
    assert mean_iou(*intersection_and_union(labels, target, num_classes=5)) == pytest.approx(expected)


def test_chance_by_hand():
    # 4 pixels of class 0, 2 of class 1, 2 of background; classes 0 and 1 drawn evenly.
    target = torch.tensor([0, 0, 0, 0, 1, 1, BACKGROUND, BACKGROUND])
    intersection, union = random_intersection_and_union(target, 3, present=[0, 1])
    assert intersection.tolist() == [2, 1, 0, 0]
    assert union.tolist() == [6, 5, 0, 2]


def test_chance_leaves_ignored_pixels_out():
    target = torch.tensor([0, 0, 255, 255, BACKGROUND])
    scored = random_intersection_and_union(target, 2, ignore=255)
    # 3 pixels are left; half of them, and both of class 0, 1.5 + 2 - 1.
    assert [each.tolist() for each in scored] == [[1, 0, 0], [2.5, 1.5, 1]]


@pytest.mark.parametrize("background", [False, True])
def test_random_labels_score_chance(background):
    target = torch.randint(BACKGROUND, 3, (100_000,))
    labels = torch.randint(BACKGROUND if background else 0, 3, (100_000,))
    measured = mean_iou(*intersection_and_union(labels, target, 3), background=background)
    expected = mean_iou(*random_intersection_and_union(target, 3, background=background), background=background)
    assert measured == pytest.approx(expected, abs=0.005)


B = BACKGROUND
TARGET = torch.tensor(
    [
        [0, 0, 1, B],
        [0, 1, B, B],
        [B, B, 1, 1],
        [B, B, 2, 1],
    ]
)


def test_the_majority_labels_whole_patches():
    labels = majority_segmentation(TARGET, (2, 2), 3, background=True)
    assert labels.tolist() == [[0, 0, B, B], [0, 0, B, B], [B, B, 1, 1], [B, B, 1, 1]]


def test_without_background_a_patch_takes_its_most_frequent_class_and_an_empty_one_that_of_the_image():
    labels = majority_segmentation(TARGET, (2, 2), 3)
    assert labels.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]


def test_the_majoritys_score_is_the_ceiling_worked_by_hand():
    labels = majority_segmentation(TARGET, (2, 2), 3, background=True)
    scored = intersection_and_union(labels, TARGET, 3)
    # 0: 3 of 4. 1: 3 of 6. 2: 0 of 1. Background: 7 of 8.
    assert mean_iou(*scored, background=True) == pytest.approx((3 / 4 + 3 / 6 + 0 + 7 / 8) / 4)


def test_a_grid_of_pixels_reaches_everything():
    assert torch.equal(majority_segmentation(TARGET, (4, 4), 3, background=True), TARGET)


def test_equal_numbers_of_pixels_go_to_the_first_class():
    assert majority_segmentation(torch.tensor([[2, 1]]), (1, 1), 3).tolist() == [[1, 1]]


def test_patches_need_not_divide_the_pixels():
    # 2 patches over 5 pixels: the third lies in the first patch, for the most part of it does.
    labels = majority_segmentation(torch.tensor([[0, 1, 1, 2, 2]]), (1, 2), 3)
    assert labels.tolist() == [[1, 1, 1, 2, 2]]


def test_ignored_pixels_have_no_say_in_the_majority():
    labels = majority_segmentation(torch.tensor([[255, 255, 1, 0]]), (1, 1), 2, ignore=255)
    assert labels.tolist() == [[0, 0, 0, 0]]


def test_an_image_of_no_class_stays_background():
    assert majority_segmentation(torch.full((2, 2), B), (1, 1), 3).tolist() == [[B, B], [B, B]]


@pytest.mark.parametrize("grid", [(3, 6), (4, 2), (5, 7)])
def test_the_majority_of_a_loop_over_pixels(grid):
    height, width = 12, 18
    target = torch.randint(B, 4, (height, width))
    inside = defaultdict(Counter)
    patch = {(r, c): (r * grid[0] // height, c * grid[1] // width) for r in range(height) for c in range(width)}
    for (row, column), place in patch.items():
        inside[place][target[row, column].item()] += 1
    majority = majority_segmentation(target, grid, 4, background=True)
    for (row, column), place in patch.items():
        label = majority[row, column].item()
        assert label == majority[patch_start(patch, place)].item()
        assert inside[place][label] == max(inside[place].values())


def patch_start(patch, place):
    return next(pixel for pixel, other in patch.items() if other == place)


def test_a_grid_finer_than_the_pixels_is_refused():
    with pytest.raises(
        ValueError, match=r"target has shape \[4, 4\], grid is 5 x 2; expected \[H, W\], no finer a grid"
    ):
        majority_segmentation(TARGET, (5, 2), 3)


def test_a_majority_of_labels_out_of_range_is_refused():
    with pytest.raises(ValueError, match="target has the label 2; expected 0 to 1, or -1 for background"):
        majority_segmentation(TARGET, (2, 2), 2)


@pytest.mark.parametrize("present", [[], [3], [-1]])
def test_classes_out_of_range_are_refused(present):
    with pytest.raises(ValueError, match=r"present is \[.*\]; expected one or more classes from 0 to 2"):
        segment(patches(0), CLASSES, (1, 1), (1, 1), present=present)
    with pytest.raises(ValueError, match=r"present is \[.*\]; expected one or more classes from 0 to 2"):
        random_intersection_and_union(TARGET, 3, present=present)


def test_a_grid_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="grid is 2 x 2 = 4; expected patch_features' P = 3"):
        segment(patches(0, 1, 2), CLASSES, (2, 2), (2, 2))


def test_features_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"class_features has D = 2 in shape \[3, 2\], patch_features has D = 3"):
        segment(patches(0), CLASSES[:, :2], (1, 1), (1, 1))


def test_a_label_out_of_range_is_refused():
    with pytest.raises(ValueError, match="target has the label 255; expected 0 to 1, or -1 for background"):
        intersection_and_union(torch.tensor([0]), torch.tensor([255]), num_classes=2)


def test_labels_of_another_dtype_are_refused():
    with pytest.raises(TypeError, match=r"labels has dtype torch\.float32; expected a tensor of torch\.int64"):
        intersection_and_union(torch.zeros(2), torch.zeros(2).long(), num_classes=2)


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"labels has shape \[2\], target \[3\]; expected the same"):
        intersection_and_union(torch.zeros(2).long(), torch.zeros(3).long(), num_classes=2)
