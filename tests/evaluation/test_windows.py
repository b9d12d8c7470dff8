"""Segmentation in sliding windows, against loops that crop, run and add."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from torch.nn import functional as F

from sparc_loss.evaluation import windows as module
from sparc_loss.evaluation.segmentation import BACKGROUND
from sparc_loss.evaluation.windows import pixel_cosines, segment_windows, windows_over

PATCH, DIMENSION = 4, 8
# Height and width of the resized image and of the file's; windows are of 16, and the last two images are smaller.
SIZES = [
    ((16, 16), (16, 16)),
    ((17, 31), (23, 40)),
    ((33, 16), (66, 31)),
    ((29, 47), (29, 47)),
    ((16, 45), (11, 30)),
    ((12, 20), (25, 41)),
    ((9, 13), (17, 29)),
]


def embed(images):
    """Patch embeddings [N, P, D] that depend on the place in the window too, as a ViT's do."""
    weight = torch.randn(DIMENSION, 3, PATCH, PATCH, dtype=images.dtype, generator=torch.Generator().manual_seed(0))
    maps = F.conv2d(images, weight, stride=PATCH)
    place = torch.linspace(0, 1, maps.shape[2] * maps.shape[3], dtype=images.dtype).view(maps.shape[2:])
    return (maps + place).flatten(2).transpose(1, 2), tuple(maps.shape[2:])


def slow_cosines(image, names, window, stride, size):
    """Crop, run, upsample, add, divide and upsample, one window and one name after the other."""
    height, width = image.shape[1:]
    side = [min(window or length, length) for length in (height, width)]
    total, count = torch.zeros(len(names), height, width, dtype=image.dtype), torch.zeros(height, width)
    tops, lefts = (
        sorted({min(start, max(length - part, 0)) for start in range(0, length + stride, stride)})
        for length, part in zip((height, width), side, strict=True)
    )
    for top in tops:
        for left in lefts:
            crop = image[:, top : top + side[0], left : left + side[1]]
            patches, grid = embed(crop[None])
            for index, name in enumerate(names):
                cosine = F.cosine_similarity(patches[0], name[None], dim=-1).view(1, 1, *grid)
                covered = (grid[0] * PATCH, grid[1] * PATCH)
                upsampled = F.interpolate(cosine, size=covered, mode="bilinear", align_corners=False)
                # Beyond the last whole patch the outermost value goes on.
                pad = (0, side[1] - covered[1], 0, side[0] - covered[0])
                total[index, top : top + side[0], left : left + side[1]] += F.pad(upsampled, pad, mode="replicate")[
                    0, 0
                ]
            count[top : top + side[0], left : left + side[1]] += 1
    return F.interpolate((total / count)[None], size=size, mode="bilinear", align_corners=False)[0]


def made(image_size, names=5):
    generator = torch.Generator().manual_seed(sum(image_size))
    image = torch.randn(3, *image_size, dtype=torch.double, generator=generator)
    return image, torch.randn(names, DIMENSION, dtype=torch.double, generator=generator)


def run(image, window, stride):
    """Patches of all windows, and what `segment_windows` needs to place them."""
    windows = windows_over(tuple(image.shape[1:]), window, stride)
    patches, grid = embed(windows.cut(image))
    extent = tuple(cells * PATCH / side for cells, side in zip(grid, windows.size, strict=True))
    return windows, patches, grid, extent


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 16), (16, 5), (0, 8)])
@pytest.mark.parametrize(("image_size", "size"), SIZES)
def test_cosines_equal_those_of_a_loop_in_float64(image_size, size, window, stride):
    image, names = made(image_size)
    windows, patches, grid, extent = run(image, window, stride)
    unit = [F.normalize(each, dim=-1) for each in (patches, names)]
    cosines = pixel_cosines(*unit, windows, grid, size, extent)
    torch.testing.assert_close(cosines, slow_cosines(image, names, window, stride, size), atol=1e-12, rtol=1e-10)


def slow_labels(cosines, labels, scale, threshold, area):
    """By the published steps: softmax over names, the most probable name of each class, areas, threshold."""
    probabilities = (scale * cosines).softmax(dim=0)
    classes = sorted(set(labels.tolist()))
    of_classes = torch.stack([probabilities[labels == label].amax(dim=0) for label in classes])
    best = of_classes.argmax(dim=0)
    if area:
        found = torch.tensor(classes)[best]
        things = int((found != BACKGROUND).sum())
        for row, label in enumerate(classes):
            if label != BACKGROUND and int((found == label).sum()) <= area * things:
                of_classes[row] = 0
        best = of_classes.argmax(dim=0)
    segmented = torch.tensor(classes)[best]
    highest = of_classes.amax(dim=0)
    return segmented.masked_fill((highest < threshold) | (highest == 0), BACKGROUND)


@pytest.mark.parametrize("block", [1, 100, 1 << 24])
@pytest.mark.parametrize("labels", [(0, 1, 2, 3, 4), (0, 0, 1, 2, 2), (0, 1, 1, BACKGROUND, BACKGROUND)])
@pytest.mark.parametrize(("threshold", "area"), [(0.0, 0.0), (0.35, 0.0), (0.0, 0.15), (0.3, 0.2)])
def test_labels_equal_those_of_the_published_steps(monkeypatch, labels, threshold, area, block):
    monkeypatch.setattr(module, "_BLOCK", block)
    image, names = made((17, 31))
    labels = torch.tensor(labels)
    windows, patches, grid, extent = run(image, 16, 8)
    segmented = segment_windows(
        patches, names, labels, windows, grid, (23, 40),
        logit_scale=5.0, background_threshold=threshold, minimal_area=area, extent=extent,
    )  # fmt: skip
    expected = slow_labels(slow_cosines(image, names, 16, 8, (23, 40)), labels, 5.0, threshold, area)
    assert segmented.shape == (23, 40)
    assert torch.equal(segmented, expected)
    assert len(segmented.unique()) > 1


def test_where_no_name_is_left_pixels_are_background():
    image, names = made((16, 16), 2)
    windows, patches, grid, extent = run(image, 16, 16)
    # Both names are of the one class, whose share is all of the image and no more.
    segmented = segment_windows(
        patches, names, torch.tensor([0, 0]), windows, grid, (16, 16), minimal_area=1.0, extent=extent
    )
    assert (segmented == BACKGROUND).all()


@pytest.mark.parametrize("argument", ["patch_features", "name_features"])
def test_what_is_not_finite_is_refused(argument):
    image, names = made((16, 16), 2)
    windows, patches, grid, extent = run(image, 16, 16)
    features = {"patch_features": patches, "name_features": names}
    features[argument] = features[argument] * torch.inf
    with pytest.raises(ValueError, match=f"^{argument} has values that are not finite; expected finite ones$"):
        segment_windows(
            **features, labels=torch.tensor([0, 1]), windows=windows, grid=grid, size=(16, 16), extent=extent
        )


def test_memory_does_not_depend_on_the_number_of_names(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 64 * 64 * 4)
    image, _ = made((64, 64))
    windows, patches, grid, extent = run(image, 32, 16)

    largest = []
    for count in (50, 1000):
        names = torch.randn(count, DIMENSION, dtype=torch.double)
        with LargestTensor() as mode:
            segment_windows(
                patches, names, torch.arange(count), windows, grid, (64, 64), background_threshold=0.1, extent=extent
            )
        largest.append(mode.elements)
    assert largest == [64 * 64 * 4] * 2


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.data())
def test_windows_cover_the_image_and_lie_within(height, width, window, data):
    stride = data.draw(st.integers(1, window))
    windows = windows_over((height, width), window, stride)
    covered = torch.zeros(height, width, dtype=torch.bool)
    for top, left in windows.corners:
        assert 0 <= top <= height - windows.size[0]
        assert 0 <= left <= width - windows.size[1]
        covered[top : top + windows.size[0], left : left + windows.size[1]] = True
    assert covered.all()
    # As many as mmsegmentation has.
    rows, columns = (max(0, math.ceil((side - window) / stride)) + 1 for side in (height, width))
    assert len(set(windows.corners)) == len(windows.corners) == rows * columns
