"""The mean IoU of a data set by a protocol, of a model that sees colours alone: what it scores is known beforehand."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from einops import rearrange, reduce
from PIL import Image
from torchmetrics.classification import MulticlassJaccardIndex

from sparc_loss.evaluation.dataset import IGNORED, DataError, EvaluationData, MaskCoding
from sparc_loss.evaluation.evaluate import Options
from sparc_loss.evaluation.evaluate_windows import check_masks, evaluate_windows
from sparc_loss.evaluation.protocol import Protocol

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
WORDS = ("", *COLOURS, "scarlet", "dark", "night")
PATCH = 4
PLAIN = Protocol((("red",), ("green",), ("blue",)), short_side=16, window=8, stride=4, templates=("{}",))
OPTIONS = Options(batch_size=3)


class Colours(torch.nn.Module):
    """Patches are one-hot: the strongest colour of each; none where all are equal. So are names."""

    def __init__(self):
        super().__init__()
        config = dict(size=8, mean=(0.0,) * 3, std=(1.0,) * 3, resize_mode="shortest", interpolation="bilinear")
        trunk = torch.nn.Identity()
        self.visual = SimpleNamespace(preprocess_cfg=config, image_size=8, patch_size=(PATCH, PATCH), trunk=trunk)
        self.sizes = []

    def encode_patches(self, images):
        self.sizes.append(tuple(images.shape))
        colours = reduce(images, "b c (h i) (w j) -> b h w c", "mean", i=PATCH, j=PATCH)
        one_hot = torch.nn.functional.one_hot(colours.argmax(dim=-1), 3).float()
        strong = torch.where(colours.amax(dim=-1, keepdim=True) > 0.1, one_hot, torch.tensor(0.1))
        return rearrange(strong, "b h w c -> b (h w) c"), tuple(colours.shape[1:3])

    def forward(self, text):  # so open_clip 4 makes its zero-shot classifier
        return None, self.encode_text(text, normalize=True)

    def encode_text(self, ids, normalize):
        rows = torch.tensor([[0.0, 0, 0], *torch.eye(3).tolist(), [1.0, 0, 0], [1.0, 1, 1], [-1.0, -1, -1]])
        return torch.nn.functional.normalize(rows[ids[:, 0]], dim=-1)


def tokenizer(texts):
    return torch.tensor([[WORDS.index(text)] for text in texts])


@pytest.fixture
def data(tmp_path):
    """An image of 16 x 24 with a column of each colour; its mask follows the grid of patches."""
    columns = np.repeat(np.array(list(COLOURS.values()), np.uint8), 8, axis=0)
    Image.fromarray(np.tile(columns, (16, 1, 1))).save(tmp_path / "image.png")
    data = EvaluationData(list(COLOURS), mask_coding=MaskCoding(first=0, background=False))
    data.add_image(tmp_path / "image.png", tmp_path / "mask.png")
    draw(data, np.tile(np.repeat([0, 1, 2], 8), (16, 1)))
    return data


def draw(data, labels):
    Image.fromarray(labels.astype(np.uint8)).save(data.masks[0])


def measured(data, protocol=PLAIN, options=OPTIONS):
    model = Colours()
    model.visual.image_size = protocol.window or 8
    return evaluate_windows(model, tokenizer, data, protocol, options)


@pytest.mark.parametrize("window", [0, 8, 16, 64])
def test_masks_that_follow_the_grid_give_one(data, window):
    measure, of_classes = measured(data, replace(PLAIN, window=window, stride=4))
    assert (measure.name, measure.value, measure.ceiling, measure.count) == ("mean_iou", 1.0, None, 3)
    assert of_classes == {"red": 1.0, "green": 1.0, "blue": 1.0}


def test_masks_that_do_not_give_the_value_computed_by_hand(data):
    # Of 8 columns each, red has 6, green 12 and blue 6 of the 24; so 2 + 2 columns are predicted wrongly.
    draw(data, np.tile(np.repeat([0, 1, 2], (6, 12, 6)), (16, 1)))
    measure, of_classes = measured(data)
    assert of_classes == {"red": pytest.approx(6 / 8), "green": pytest.approx(8 / 12), "blue": pytest.approx(6 / 8)}
    assert measure.value == pytest.approx((6 / 8 + 8 / 12 + 6 / 8) / 3)
    # A class drawn at random is right for a third of its pixels: n/3 of n + 24/3 - n/3.
    assert measure.chance == pytest.approx(sum(n / 3 / (n + 8 - n / 3) for n in (6, 12, 6)) / 3)


def test_ignored_pixels_count_for_nothing(data):
    labels = np.tile(np.repeat([0, 1, 2], (6, 12, 6)), (16, 1))
    labels[:, 6:8] = labels[:, 16:18] = IGNORED
    draw(data, labels)
    assert measured(data)[0].value == 1.0


def test_it_equals_torchmetrics_over_several_images(data, tmp_path):
    generator = np.random.default_rng(0)
    predicted, targets = [], []
    for index in range(3):
        image, mask = tmp_path / f"{index}.png", tmp_path / f"{index}-mask.png"
        blocks = generator.integers(0, 3, (4, 6))
        pixels = np.array(list(COLOURS.values()), np.uint8)[np.kron(blocks, np.ones((4, 4), int))]
        Image.fromarray(pixels).save(image)
        labels = generator.choice([0, 1, 2, IGNORED], (16, 24), p=[0.4, 0.3, 0.2, 0.1])
        Image.fromarray(labels.astype(np.uint8)).save(mask)
        data.add_image(image, mask)
        predicted.append(blocks)
        targets.append(torch.from_numpy(labels))
    data = replace(data, images=data.images[1:], masks=data.masks[1:])
    # One window, so that a patch's class is known; between patches the nearest one wins.
    index = MulticlassJaccardIndex(3, average=None, ignore_index=IGNORED)
    for blocks, target in zip(predicted, targets, strict=True):
        maps = torch.nn.functional.one_hot(torch.from_numpy(blocks), 3).float().permute(2, 0, 1)[None]
        upsampled = torch.nn.functional.interpolate(maps, size=(16, 24), mode="bilinear", align_corners=False)
        index.update(upsampled[0].argmax(dim=0)[None], target[None])
    measure, of_classes = measured(data, replace(PLAIN, window=0))
    assert list(of_classes.values()) == pytest.approx(index.compute().tolist())
    assert measure.value == pytest.approx(index.compute().mean().item())


def test_the_best_of_several_names_counts(data):
    protocol = replace(PLAIN, classes=(("night", "scarlet"), ("green",), ("blue",)))
    assert measured(data, protocol)[0].value == 1.0
    assert measured(data, replace(PLAIN, classes=(("night",), ("green",), ("blue",))))[0].value < 1.0


def test_background_by_a_threshold_and_by_names(data):
    data.mask_coding = MaskCoding()  # 0 is background, 1 the first class
    Image.fromarray(np.zeros((16, 24, 3), np.uint8)).save(data.images[0])  # black: all cosines are equal
    draw(data, np.zeros((16, 24)))
    threshold = replace(PLAIN, background_threshold=0.5)
    for protocol in (threshold, replace(PLAIN, background=("dark",))):
        measure, of_classes = measured(data, protocol)
        assert (measure.value, of_classes) == (1.0, {"background": 1.0})
    assert measured(data)[1]["background"] == 0.0


def test_a_name_of_a_class_and_of_background_is_background(data):
    data.mask_coding = MaskCoding()
    draw(data, np.tile(np.repeat([0, 2, 3], 8), (16, 1)))
    assert measured(data, replace(PLAIN, background=("red",)))[1]["background"] == 1.0


def test_classes_that_are_not_present_can_be_left_out(data):
    draw(data, np.tile(np.repeat([0, 1, 1], 8), (16, 1)))
    assert measured(data)[1]["blue"] == 0.0
    assert "blue" not in measured(data, replace(PLAIN, classes_offered="present"))[1]


def test_masks_without_a_pixel_of_a_class_are_refused(data):
    draw(data, np.full((16, 24), IGNORED))
    with pytest.raises(DataError, match="the masks have no pixel of a class; expected at least one"):
        measured(data)


def test_windows_are_read_in_batches(data):
    model = Colours()
    evaluate_windows(model, tokenizer, data, PLAIN, OPTIONS)
    # 3 x 5 windows of 8 x 8 pixels, three at a time.
    assert model.sizes == [(3, 3, 8, 8)] * 5


def test_the_short_side_is_that_of_the_protocol(data):
    model = Colours()
    evaluate_windows(model, tokenizer, data, replace(PLAIN, short_side=8, window=0), OPTIONS)
    assert model.sizes == [(1, 3, 8, 12)]


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((375, 500), 448, (448, 597)),
        ((1, 4000), 448, (32, 2048)),  # but for its end: a patch of any model
        ((500, 375), 336, (448, 336)),
        ((100, 1000), 336, (205, 2048)),
        ((7, 3), 3, (7, 3)),
    ],
)
def test_sizes_are_those_of_mmsegmentation(size, short_side, expected):
    # Its scale is (2048, short side): the long side has an end, and halves are rounded up.
    assert replace(PLAIN, short_side=short_side).image_size(size) == expected


def test_another_number_of_classes_is_refused(data):
    with pytest.raises(ValueError, match="protocol has 2 classes; expected those of the data, 3"):
        measured(data, replace(PLAIN, classes=(("red",), ("green",))))


def test_a_window_that_the_tower_does_not_take_is_refused(data):
    with pytest.raises(ValueError, match="a Identity, which takes images of 8 x 8 pixels only; found 16 x 16"):
        evaluate_windows(Colours(), tokenizer, data, replace(PLAIN, window=16), OPTIONS)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"window": -1}, "window is -1; expected a whole number of at least 0"),
        ({"stride": 0}, "stride is 0; expected a whole number of at least 1"),
        ({"stride": 9}, "stride is 9, window 8; expected a stride no larger, or pixels are left out"),
        ({"short_side": 0}, "short_side is 0; expected a whole number of at least 1"),
        ({"logit_scale": -1.0}, "logit_scale is -1.0; expected a number of at least 0"),
        ({"background_threshold": 2}, "background_threshold is 2; expected a number between 0 and 1"),
        ({"minimal_area": -0.1}, "minimal_area is -0.1; expected a number between 0 and 1"),
        ({"classes_offered": "some"}, "classes_offered is 'some'; expected one of 'all', 'present'"),
        ({"ignored_values": (0, 256)}, "ignored_values is [0, 256]; expected values of 0 to 255"),
        ({"reading": "first"}, "reading is 'first'; expected one of 'last', 'value', 'self', 'clear'"),
    ],
)
def test_a_wrong_protocol_is_refused(changes, text):
    with pytest.raises(ValueError, match="expected") as error:
        replace(PLAIN, **changes)
    assert str(error.value) == text


def test_whole_masks_are_found_whole(data):
    check_masks(data)


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (np.zeros((16, 24, 3)), "mask.png has mode RGB; expected 8 bits a pixel, grey or palette"),
        (np.zeros((16, 23)), r"mask.png is \[16, 23\], its image \[16, 24\]; expected the same height and width"),
        (np.full((16, 24), 3), r"mask.png has the value 3; expected 0 to 2 \(classes\) or 255"),
    ],
)
def test_broken_masks_are_told_before_anything_is_measured(data, mask, text):
    draw(data, mask)
    with pytest.raises(DataError, match=text):
        check_masks(data)
