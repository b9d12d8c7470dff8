"""open_clip's training transform on an image and its boxes."""

import random
import re

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import v2

from sparc_loss.regions.joint_transform import JointTransform, boxes_of

AUGMENTATIONS = {
    "open_clip's": {},
    "jitter and grey": {"color_jitter": (0.3, 0.3, 0.3, 0.1), "color_jitter_prob": 0.8, "gray_scale_prob": 0.5},
    "small crops": {"scale": (0.1, 0.3)},
}


def picture(width=50, height=40, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_the_image_is_the_one_that_open_clip_makes_with_the_same_random_numbers(augmentation, mode):
    transform = image_transform(32, is_train=True, aug_cfg=AUGMENTATIONS[augmentation])
    image = picture(mode=mode)
    for seed in range(8):
        torch.manual_seed(seed)
        random.seed(seed)
        expected = transform(image)
        torch.manual_seed(seed)
        random.seed(seed)
        found, _ = JointTransform(transform)(image, boxes_of([(1, 2, 3, 4)], image))
        assert torch.equal(found, expected)


def test_resizing_centre_crops_and_flips_move_boxes_too():
    steps = [v1.Resize(20), v1.CenterCrop(20), v1.RandomHorizontalFlip(1.0), v1.ToTensor()]
    image = picture(width=40, height=20)
    for transform in (v1.Compose(steps), v2.Compose([v2.Resize(20), v2.CenterCrop(20), v2.RandomHorizontalFlip(1.0)])):
        _, moved = JointTransform(transform)(image, boxes_of([(10, 0, 15, 20), (0, 0, 5, 5)], image))
        assert moved[0].tolist() == [15, 0, 20, 20]
        assert moved[1, 0] == moved[1, 2]  # cropped away


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_boxes_follow_open_clips_evaluation_transforms(mode):
    """A white box on black stays where the transformed box is."""
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[20:50, 30:70] = 255
    transform = image_transform((24, 36), is_train=False, mean=(0,) * 3, std=(1,) * 3, resize_mode=mode)
    image, moved = JointTransform(transform)(
        Image.fromarray(pixels), boxes_of([(30, 20, 70, 50)], Image.fromarray(pixels))
    )
    assert torch.equal(image, transform(Image.fromarray(pixels)))
    rows, columns = ((image.mean(dim=0) > 0.5).any(dim=axis).nonzero() for axis in (1, 0))
    found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert [float(each) for each in found] == pytest.approx(moved[0].tolist(), abs=1)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (v1.ToTensor(), "the image transform is a ToTensor; expected torchvision's Compose"),
        (v1.Compose([v1.RandomRotation(3)]), "the image transform has the step RandomRotation; expected steps that"),
        (v1.Compose([v1.RandomVerticalFlip()]), "the image transform has the step RandomVerticalFlip; expected"),
    ],
    ids=["no composition", "rotation", "flip"],
)
def test_a_step_that_boxes_cannot_follow_is_refused_by_name(transform, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        JointTransform(transform)


def test_timms_transforms_are_refused():
    with pytest.raises(
        ValueError, match="the image transform has the step RandomResizedCropAndInterpolation; expected"
    ):
        JointTransform(image_transform(32, is_train=True, aug_cfg={"use_timm": True}))
