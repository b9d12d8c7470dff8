"""Detection: matching and losses against slow references, and the command on scenes that can be learnt by heart."""

import json
import math
from itertools import permutations

import pytest
import torch
from easy_scenes import SQUARES, write_scenes, write_untrained
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from examples.detection.average_precision import predictions
from examples.detection.command import main, make_detection_parser
from examples.detection.heads import DetectionHeads, patch_boxes
from examples.detection.loss import Targets, detection_loss, match, name_costs
from examples.detection.objects import read_objects
from examples.detection.training import NAMES_PER_STEP, _names_of_step, _targets
from examples.downstream import embedded_batches as embedded_batches_module
from examples.downstream.backbone import Backbone, load_backbone
from examples.downstream.embedded_batches import embedded_batches
from sparc_loss.evaluation.dataset import DataError

PATCHES, NAMES = 5, 3


def random_boxes(number: int, generator: torch.Generator) -> Tensor:
    corners = torch.rand(number, 2, 2, generator=generator).sort(dim=1).values
    return corners.reshape(number, 4) + torch.tensor([0, 0, 0.01, 0.01])


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def focal(logit: float, truth: bool) -> float:
    """Lin et al., arXiv 1708.02002, equation 5, with alpha 0.25 and gamma 2."""
    probability = sigmoid(logit)
    if truth:
        return -0.25 * (1 - probability) ** 2 * math.log(probability)
    return -0.75 * probability**2 * math.log(1 - probability)


def generalised_iou(one: list[float], other: list[float]) -> float:
    """Rezatofighi et al., arXiv 1902.09630, algorithm 1."""

    def area(box: list[float]) -> float:
        return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])

    low = [max(a, b) for a, b in zip(one[:2], other[:2], strict=True)]
    high = [min(a, b) for a, b in zip(one[2:], other[2:], strict=True)]
    shared = area([*low, *high])
    union = area(one) + area(other) - shared
    hull_low = [min(a, b) for a, b in zip(one[:2], other[:2], strict=True)]
    hull_high = [max(a, b) for a, b in zip(one[2:], other[2:], strict=True)]
    hull = area([*hull_low, *hull_high])
    return shared / union - (hull - union) / hull


def distance(one: list[float], other: list[float]) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))


def cost(logits: Tensor, boxes: Tensor, target: Targets, patch: int, number: int) -> float:
    logit = logits[patch, target.names[number]].item()
    box, true = boxes[patch].tolist(), target.boxes[number].tolist()
    return 2 * (focal(logit, True) - focal(logit, False)) + 5 * distance(box, true) - 2 * generalised_iou(box, true)


def random_image(seed: int, objects: int) -> tuple[Tensor, Tensor, Targets]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(PATCHES, NAMES, generator=generator)
    target = Targets(random_boxes(objects, generator), torch.randint(NAMES, (objects,), generator=generator))
    return logits, random_boxes(PATCHES, generator), target


images = st.builds(random_image, st.integers(0, 10_000), st.integers(0, 4))


@given(images)
def test_no_other_matching_costs_less(image):
    logits, boxes, target = image
    patches, objects = match(name_costs(logits), boxes, target)
    assert sorted(objects.tolist()) == list(range(len(target.names)))
    assert len(set(patches.tolist())) == len(patches)
    found = sum(cost(logits, boxes, target, *pair) for pair in zip(patches.tolist(), objects.tolist(), strict=True))
    least = min(
        sum(cost(logits, boxes, target, patch, number) for number, patch in enumerate(chosen))
        for chosen in permutations(range(PATCHES), len(target.names))
    )
    assert found == pytest.approx(least, abs=1e-4)


@given(st.lists(images, min_size=1, max_size=3))
def test_the_loss_is_the_sum_over_names_and_matched_boxes(batch):
    logits, boxes, targets = (list(each) for each in zip(*batch, strict=True))
    found = detection_loss(torch.stack(logits), torch.stack(boxes), targets).item()
    expected = 0.0
    for image in range(len(batch)):
        pairs = dict(
            zip(
                *(each.tolist() for each in match(name_costs(logits[image]), boxes[image], targets[image])),
                strict=True,
            )
        )
        for patch in range(PATCHES):
            number = pairs.get(patch)
            name = None if number is None else targets[image].names[number].item()
            expected += sum(2 * focal(logits[image][patch, each].item(), each == name) for each in range(NAMES))
            if number is not None:
                box, true = boxes[image][patch].tolist(), targets[image].boxes[number].tolist()
                expected += 5 * distance(box, true) + 2 * (1 - generalised_iou(box, true))
    expected /= max(1, sum(len(target.names) for target in targets))
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_of_more_objects_than_patches_some_are_left_out():
    logits, boxes, _ = random_image(0, 0)
    generator = torch.Generator().manual_seed(1)
    target = Targets(random_boxes(PATCHES + 2, generator), torch.zeros(PATCHES + 2, dtype=torch.long))
    patches, objects = match(name_costs(logits), boxes, target)
    assert len(patches) == len(objects) == PATCHES
    assert detection_loss(logits[None], boxes[None], [target]).isfinite()


def test_patch_boxes_by_hand():
    third = 1 / 3
    expected = [[third * (column + 0.5), (row + 0.5) / 2, third, 0.5] for row in range(2) for column in range(3)]
    assert torch.allclose(patch_boxes((2, 3)), torch.tensor(expected))


def test_the_first_boxes_are_those_of_the_patches_and_nothing_is_found():
    torch.manual_seed(0)
    heads = DetectionHeads(8, (2, 3))
    names = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
    logits, boxes = heads(torch.randn(1, 6, 8), names)
    assert torch.allclose(boxes[0, 4], torch.tensor([1 / 3, 0.5, 2 / 3, 1.0]), atol=1e-5)
    # A cosine of 0 begins with the probability of 1 %; the scale is 10.
    assert logits.shape == (1, 6, 4)
    assert (logits - torch.logit(torch.tensor(0.01))).abs().max() <= 10
    patches = torch.randn(1, 6, 8)
    cosines = torch.nn.functional.normalize(patches, dim=-1) @ names.T
    assert torch.allclose(heads(patches, names)[0], 10 * cosines + torch.logit(torch.tensor(0.01)), atol=1e-4)


def test_predictions_are_the_most_certain_pairs_of_patch_and_name():
    logits = torch.tensor([[0.0, 3.0], [2.0, -1.0]])
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [2.0, 2.0, 3.0, 3.0]])
    found = predictions(logits, boxes)
    assert found["labels"].tolist() == [1, 0, 0, 1]
    assert found["boxes"][:, 0].tolist() == [0, 2, 0, 2]
    assert torch.allclose(found["scores"], torch.tensor([3.0, 2.0, 0.0, -1.0]).sigmoid())


def test_boxes_become_shares_of_the_image_and_stay_within_it():
    objects = [("a dog", (10.0, 5.0, 30.0, 25.0)), ("a cat", (-4.0, 0.0, 80.0, 50.0))]
    target = _targets(objects, (50, 40), ["a cat", "a dog"], torch.device("cpu"))
    assert torch.allclose(target.boxes, torch.tensor([[0.25, 0.1, 0.75, 0.5], [0.0, 0.0, 1.0, 1.0]]))
    assert target.names.tolist() == [1, 0]


def test_a_step_has_the_names_of_its_images_and_others_up_to_a_limit():
    names = [f"a thing {index}" for index in range(2 * NAMES_PER_STEP)]
    own = [[(names[7], (0.0, 0.0, 1.0, 1.0))], [(names[-1], (0.0, 0.0, 1.0, 1.0))]]
    chosen = _names_of_step(own, names, torch.Generator().manual_seed(0))
    assert len(chosen) == len(set(chosen)) == NAMES_PER_STEP
    assert {names[7], names[-1]} <= set(chosen)
    assert set(_names_of_step(own, names[:8], torch.Generator())) == {*names[:8], names[-1]}


def test_an_object_of_several_captions_counts_once(tmp_path):
    path = write_scenes(tmp_path, ("red",))
    rows = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*rows, rows[1]]) + "\n", encoding="utf-8")
    assert [len(objects) for objects in read_objects(str(path)).objects] == [1]


def test_a_csv_without_boxes_is_refused(tmp_path):
    path = write_scenes(tmp_path, ("red", "blue"), without_boxes=("red", "blue"))
    with pytest.raises(DataError, match=r"pairs.csv has no boxes; expected a column boxes with the objects"):
        read_objects(str(path))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return write_untrained(tmp_path_factory.mktemp("model") / "untrained")


@pytest.mark.slow
class TestCommand:
    def flags(self, model, train, test, *further) -> list[str]:
        data = ["--train-data", str(train), "--test-data", str(test)]
        return ["--model", model, *data, "--workers", "0", "--device", "cpu", *further]

    def test_easy_scenes_are_learnt_by_heart(self, model, tmp_path, capsys):
        train = write_scenes(tmp_path / "train")
        output = tmp_path / "figures.json"
        further = ["--fine-tune", "--steps", "300", "--lr", "5e-3", "--batch-size", "6", "--output", str(output)]
        measures = main(self.flags(model, train, train, *further))
        assert measures["mAP"] > 0.95
        assert measures["mAP of names with boxes in training"] == pytest.approx(measures["mAP"])
        assert (measures["images"], measures["boxes"], measures["names"]) == (6, 6, 6)
        assert json.loads(output.read_text(encoding="utf-8"))["measures"] == measures
        assert "mAP of names without" in capsys.readouterr().out

    def test_names_without_boxes_in_training_are_measured_apart(self, model, tmp_path):
        train = write_scenes(tmp_path / "train", without_boxes=("red",))
        test = write_scenes(tmp_path / "test")
        measures = main(self.flags(model, train, test, "--steps", "150", "--lr", "5e-3", "--batch-size", "6"))
        assert measures["names without boxes in training"] == 1
        apart = measures["mAP of names without"]
        together = measures["mAP of names with boxes in training"]
        assert measures["mAP"] == pytest.approx((apart + 5 * together) / 6)
        assert together > apart

    def test_where_every_name_had_a_box_there_is_no_figure_of_others(self, model, tmp_path):
        train = write_scenes(tmp_path / "train")
        assert main(self.flags(model, train, train, "--steps", "1"))["mAP of names without"] is None

    def test_a_frozen_backbone_embeds_an_image_once_as_far_as_memory_goes(self, model, tmp_path, monkeypatch):
        args = make_detection_parser().parse_args(self.flags(model, write_scenes(tmp_path / "train"), "unread"))
        args.precision = "fp32"
        backbone, paths, order = load_backbone(args), read_objects(args.train_data).images, [0, 3, 1, 4, 3, 0, 5, 1]
        embedded = []

        def patches(backbone: Backbone, images: Tensor) -> Tensor:
            embedded.append(len(images))
            return embed(backbone, images)

        embed = Backbone.patches
        monkeypatch.setattr(Backbone, "patches", patches)
        kept = list(embedded_batches(backbone, paths, order, 2, 0))
        assert embedded == [2, 2, 1]
        monkeypatch.setattr(embedded_batches_module, "KEPT_BYTES", 0)
        read_again = list(embedded_batches(backbone, paths, order, 2, 0))
        for one, other in zip(kept, read_again, strict=True):
            assert (one.indices, one.sizes) == (other.indices, other.sizes)
            assert_close(one.patches, other.patches)
        assert [index for batch in kept for index in batch.indices] == order

    def test_the_same_seed_gives_the_same_figures(self, model, tmp_path):
        train = write_scenes(tmp_path / "train")
        flags = self.flags(model, train, train, "--steps", "20", "--batch-size", "4", "--seed", "3")
        assert main(flags) == main(flags)

    @pytest.mark.parametrize(
        ("further", "text"),
        [
            (["--steps", "0"], "argument --steps is 0; expected a number of at least 1"),
            (["--batch-size", "0"], "argument --batch-size is 0; expected a number of at least 1"),
            (["--output", "no/such/folder/f.json"], "argument --output: 'no/such/folder/f.json' is in no folder"),
            (["--lr", "1e30", "--steps", "9"], "are not finite; expected finite numbers: a smaller --lr"),
        ],
    )
    def test_what_cannot_be_is_one_line_of_error(self, model, tmp_path, capsys, further, text):
        train = write_scenes(tmp_path / "train", tuple(SQUARES)[:2])
        with pytest.raises(SystemExit) as stopped:
            main(self.flags(model, train, train, *further))
        assert stopped.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert text in line

    @pytest.mark.parametrize("problem", ["no file", "no image", "no model"])
    def test_what_cannot_be_read_is_one_line_of_error(self, model, tmp_path, capsys, problem):
        train = write_scenes(tmp_path / "train", tuple(SQUARES)[:2])
        flags = self.flags(model, train, train, "--steps", "1")
        if problem == "no file":
            (tmp_path / "train" / "red.png").unlink()
            text = "there is no file"
        elif problem == "no image":
            (tmp_path / "train" / "red.png").write_text("not an image", encoding="utf-8")
            text = "red.png cannot be read as an image"
        else:
            flags[1] = "ViT-B-99"
            text = "argument --model: 'ViT-B-99' is no model of open_clip"
        with pytest.raises(SystemExit) as stopped:
            main(flags)
        assert stopped.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert text in line
