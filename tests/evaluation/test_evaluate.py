"""Every measure of a data set, of a model that sees colours and nothing else: what it scores is known beforehand."""

import multiprocessing
import time
import weakref
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from einops import reduce
from PIL import Image

from sparc_loss.evaluation.dataset import DataError, EvaluationData
from sparc_loss.evaluation.encoder import Encoder
from sparc_loss.evaluation.evaluate import Options, evaluate
from sparc_loss.evaluation.image_batches import image_batches
from sparc_loss.functional import fine_grained_loss
from sparc_loss.named_objects import NamedObject

WORDS = ("<start>", "<end>", "a", "red", "green", "blue", "yellow", "and")
COLOURS = {"red": (1.0, 0, 0), "green": (0, 1.0, 0), "blue": (0, 0, 1.0), "yellow": (1.0, 1.0, 0)}
# Left to right over an image of 48 x 96, its lowest sixth left black.
STRIPES = ("red", "green", "blue")
# One more than there is to see, which the border between red and green resembles most.
CLASSES = (*STRIPES, "yellow")


class ColourTokenizer:
    """A token per word."""

    sot_token_id, eot_token_id = 0, 1

    def __call__(self, texts):
        ids = torch.ones(len(texts), 12, dtype=torch.long)
        for row, text in enumerate(texts):
            words = [WORDS.index(word) for word in text.split()]
            ids[row, : len(words) + 1] = torch.tensor([0, *words])
        return ids


class ColourModel(torch.nn.Module):
    """A patch is its mean colour and how black it is, a word the colour it names, a text the sum of its words."""

    def __init__(self):
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.tensor(3.0))
        config = dict(size=24, mean=(0.0,) * 3, std=(1.0,) * 3, resize_mode="shortest")
        self.visual = SimpleNamespace(preprocess_cfg=config)

    def encode_patches(self, images):
        colours = reduce(images, "b c (h i) (w j) -> b (h w) c", "mean", i=4, j=4)
        return _with_black(colours), (6, 6)

    def encode_image(self, images, normalize):
        return torch.nn.functional.normalize(_with_black(images.mean(dim=(2, 3))), dim=-1)

    def encode_tokens(self, texts):
        colours = torch.tensor([(*COLOURS.get(word, (0.0, 0, 0)), 0.0) for word in WORDS])
        return colours[texts], texts > 1

    def forward(self, text):  # so open_clip 4 makes its zero-shot classifier
        return None, self.encode_text(text, normalize=True)

    def encode_text(self, texts, normalize):
        return torch.nn.functional.normalize(self.encode_tokens(texts)[0].sum(dim=1), dim=-1)


def _with_black(colours):
    return torch.cat([colours, 1 - colours.amax(dim=-1, keepdim=True)], dim=-1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two images of three stripes each, the second mirrored, with everything known of them."""
    folder = tmp_path_factory.mktemp("stripes")
    data = EvaluationData(list(CLASSES))
    for number, stripes in enumerate((STRIPES, STRIPES[::-1])):
        pixels, mask = np.zeros((48, 96, 3), np.uint8), np.zeros((48, 96), np.uint8)
        objects = []
        for index, colour in enumerate(stripes):
            box = (32 * index, 0, 32 * index + 32, 40)
            pixels[:40, box[0] : box[2]] = 255 * np.array(COLOURS[colour])
            mask[:40, box[0] : box[2]] = STRIPES.index(colour) + 1
            objects.append(NamedObject(f"a {colour}", box, (3 * index + 1,)))
        Image.fromarray(pixels).save(folder / f"{number}.png")
        Image.fromarray(mask).save(folder / f"{number}-mask.png")
        data.images.append(folder / f"{number}.png")
        data.masks.append(folder / f"{number}-mask.png")
        data.labels.append(STRIPES.index("green"))
        for caption in (" and ".join(f"a {colour}" for colour in stripes), "a green"):
            data.captions.append(caption)
            data.image_index.append(number)
            data.objects.append(tuple(objects) if "red" in caption else ())
            data.hard_negatives.append("a red" if caption == "a green" else None)
    return data


@pytest.fixture(scope="module")
def measured(data):
    options = Options(
        templates=["a {}", "{}"], background_threshold=0.5, nouns_and_adjectives=set(COLOURS), batch_size=2
    )
    measures, dependence = evaluate(ColourModel(), ColourTokenizer(), data, options)
    return {each.name: each for each in measures}, dependence


def test_the_measures_that_the_data_allow(measured):
    assert list(measured[0]) == [
        "image_to_text_R@1",
        "text_to_image_R@1",
        "k_precision",
        "k_precision_of_nouns_and_adjectives",
        "hard_negative_accuracy",
        "zero_shot_top1",
        "phrase_pointing",
        "phrase_tokens_pointing",
        "word_pointing",
        "mean_iou_of_objects",
        "mean_iou",
        "mean_iou_with_background",
    ]


@pytest.mark.parametrize("name", ["phrase_pointing", "phrase_tokens_pointing", "word_pointing"])
def test_boxes_lie_where_the_patches_of_the_whole_image_are(measured, name):
    # The model's own preprocessing would cut the outer stripes off. A box has 2 x 5 of the 6 x 6 centres.
    assert measured[0][name][1:] == (1, pytest.approx(10 / 36), 1, 6)


@pytest.mark.parametrize("word", ["yellow-green", "green-yellow"])
def test_a_word_of_several_tokens_is_their_mean(data, word):
    class Hyphens(ColourTokenizer):
        def __call__(self, texts):
            return super().__call__([text.replace("-", " ") for text in texts])

    # Yellow alone resembles red and green alike, a tie.
    named = one_caption(data, f"a {word}", NamedObject("a green", (32, 0, 64, 40), (1,)))
    assert pointing(named, tokenizer=Hyphens())["word_pointing"][0] == 1
    alone = one_caption(data, "a yellow", NamedObject("a green", (32, 0, 64, 40), (1,)))
    assert pointing(alone)["word_pointing"][0] == 0


def test_padding_is_no_token_of_a_phrase(data):
    class BluePadding(ColourModel):
        def encode_tokens(self, texts):
            features, mask = super().encode_tokens(texts)
            return torch.where(mask.unsqueeze(-1), features, torch.tensor([0, 0, 1.0, 0])), mask

    games = pointing(one_caption(data, "a red", NamedObject("a red", (0, 0, 32, 40))), BluePadding())
    assert games["phrase_tokens_pointing"][0] == 1


def one_caption(data, caption, *objects):
    """The first image, left to right red, green and blue, with a caption and its objects."""
    return EvaluationData([], data.images[:1], [caption], [0], [objects], [None], [None], [None])


def pointing(data, model=None, tokenizer=None):
    measures, _ = evaluate(model or ColourModel(), tokenizer or ColourTokenizer(), data)
    return {each.name: each[1:] for each in measures if each.name.endswith("pointing")}


def test_a_phrase_with_several_boxes_is_found_in_any_of_them(data):
    here, there = (NamedObject("a red", (left, 0, left + 32, 40), (1,)) for left in (0, 64))
    for boxes in ((here, there), (there, here)):
        games = pointing(one_caption(data, "a red", *boxes))
        assert len(games) == 3
        # Two boxes of 2 x 5 centres; the map of a word that two boxes share is one map.
        assert all(game == (1, pytest.approx(20 / 36), 1, 1) for game in games.values())


def test_two_objects_of_one_phrase_are_still_two_words(data):
    boxes = NamedObject("a red", (0, 0, 32, 40), (1,)), NamedObject("a red", (64, 0, 96, 40), (4,))
    games = pointing(one_caption(data, "a red and a red", *boxes))
    assert games["phrase_pointing"][3] == games["phrase_tokens_pointing"][3] == 1
    assert games["word_pointing"] == (0.5, pytest.approx(10 / 36), 1, 2)


@pytest.mark.parametrize("box", [(96, 0, 97, 1), (0, 48, 1, 49), (-1, 0, 0, 1), (0, -1, 1, 0)])
def test_a_box_outside_its_image_is_refused(data, box):
    with pytest.raises(
        DataError, match=r"0\.png is 96 pixels wide and 48 high; the box \[.*\] of 'a red' lies outside"
    ):
        pointing(one_caption(data, "a red", NamedObject("a red", box)))


def test_masks_lie_where_the_patches_of_the_whole_image_are(measured):
    assert measured[0]["mean_iou_of_objects"][1:] == (1, pytest.approx(1 / 5), 1, 3)


def test_background_is_a_class_of_its_own_above_the_threshold(measured):
    # Not quite 1: where two stripes and the black meet, interpolation leaves none of them half a cosine.
    assert measured[0]["mean_iou_with_background"].value == pytest.approx(1, abs=0.03)
    assert measured[0]["mean_iou_with_background"][3:] == (1, 4)


def test_without_background_its_pixels_count_against_the_classes(measured):
    # The black sixth is given to a class in any case, and every class has as much of it at best.
    assert measured[0]["mean_iou"].ceiling < 1
    assert measured[0]["mean_iou"].value < 1
    assert measured[0]["mean_iou"].count == 3
    # Drawn from three classes: a third of its 1280 pixels right, over 1280 + a third of the other 3328.
    assert measured[0]["mean_iou"].chance == pytest.approx((1280 / 3) / (1280 + 3328 / 3))


def test_pooled_features_see_what_the_models_own_preprocessing_shows(tmp_path):
    # The middle square is green, the rest red: cut to a square the image is green, the whole of it mostly red.
    pixels = np.zeros((24, 96, 3), np.uint8)
    pixels[:] = 255 * np.array(COLOURS["red"])
    pixels[:, 36:60] = 255 * np.array(COLOURS["green"])
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    wide = EvaluationData(list(STRIPES), [tmp_path / "wide.png"], ["a green"], [0], [()], [None], [None], [1])
    measures, _ = evaluate(ColourModel(), ColourTokenizer(), wide, Options(templates=["a {}", "{}"]))
    assert measures[-1] == ("zero_shot_top1", 1, pytest.approx(1 / 3), 1, 1)


def test_hard_negatives_are_scored_where_there_are_some(measured):
    assert measured[0]["hard_negative_accuracy"] == ("hard_negative_accuracy", 1, 0.5, 1, 2)


def test_captions_that_tie_find_nothing(measured):
    # Both images have the caption "a green", which is nearest to both.
    assert measured[0]["image_to_text_R@1"] == ("image_to_text_R@1", 0, 0.5, 1, 2)
    assert measured[0]["text_to_image_R@1"] == ("text_to_image_R@1", 0, 0.5, 1, 4)


def test_faithfulness_of_the_nearest_caption(measured):
    # "a green" of the other image: all of it is true.
    assert measured[0]["k_precision"] == ("k_precision", 1, 1, 1, 2)
    assert measured[0]["k_precision_of_nouns_and_adjectives"].value == 1


def test_a_model_that_knows_colours_needs_no_image_where_all_have_the_same(measured):
    dependence = measured[1]
    stripes = [torch.tensor([(*COLOURS[colour], 0.0) for colour in order]) for order in (STRIPES, STRIPES[::-1])]
    patches = torch.zeros(2, 6, 6, 4)
    patches[..., 3] = 1
    patches[:, :5] = torch.stack(stripes).repeat_interleave(2, dim=1)[:, None]
    texts = ColourTokenizer()([" and ".join(f"a {colour}" for colour in order) for order in (STRIPES, STRIPES[::-1])])
    tokens, mask = ColourModel().encode_tokens(texts)
    loss = fine_grained_loss(patches.flatten(1, 2), tokens, mask, np.exp(3))
    assert dependence.right.loss == pytest.approx(loss.item(), rel=0.02)
    assert dependence.tokens == 2 * 8
    assert dependence.shuffled_gap.loss == pytest.approx(0, abs=1e-3)


def test_batches_do_not_show(data, measured):
    options = Options(
        templates=["a {}", "{}"], background_threshold=0.5, nouns_and_adjectives=set(COLOURS), batch_size=1
    )
    measures, dependence = evaluate(ColourModel(), ColourTokenizer(), data, options)
    for each in measures:
        assert each[1:] == pytest.approx(measured[0][each.name][1:])
    assert dependence is None  # no batch has a second image


@pytest.fixture
def bare(data):
    """The images and captions alone."""
    return EvaluationData(
        [], data.images, data.captions, data.image_index, [()] * 4, [None] * 4, [None] * 2, [None] * 2
    )


def test_images_and_captions_alone_allow_retrieval_faithfulness_and_the_probe(bare):
    measures, dependence = evaluate(ColourModel(), ColourTokenizer(), bare)
    assert [each.name for each in measures] == ["image_to_text_R@1", "text_to_image_R@1", "k_precision"]
    assert dependence is not None


def test_images_keep_their_own_figures_in_whatever_order_they_are_met(tmp_path):
    many = EvaluationData(list(STRIPES))
    for number in range(12):
        colour = STRIPES[number % 3]
        Image.new("RGB", (24, 24), tuple(int(255 * part) for part in COLOURS[colour])).save(tmp_path / f"{number}.png")
        Image.new("L", (24, 24), 1 + number % 3).save(tmp_path / f"{number}-mask.png")
        many.images.append(tmp_path / f"{number}.png")
        many.masks.append(tmp_path / f"{number}-mask.png")
        many.labels.append(number % 3)
        many.captions.append(f"a {colour}")
        many.image_index.append(number)
        many.objects.append(())
        many.hard_negatives.append(f"a {STRIPES[number % 3 - 1]}")
    measures, _ = evaluate(ColourModel(), ColourTokenizer(), many, Options(templates=["{}"], batch_size=5))
    values = {each.name: each.value for each in measures}
    names = ("image_to_text_R@10", "zero_shot_top1", "hard_negative_accuracy", "k_precision", "mean_iou_of_objects")
    assert [values[name] for name in names] == [1, 1, 1, 1, 1]


def test_ignored_pixels_of_a_mask_count_nowhere(data, tmp_path):
    # The third stripe is ignored, and there is no background.
    Image.fromarray(np.asarray(Image.open(data.images[0]))[:40]).save(tmp_path / "stripes.png")
    Image.fromarray(np.repeat(np.array([[1, 2, 255]], np.uint8), 32, axis=1).repeat(40, axis=0)).save(
        tmp_path / "mask.png"
    )
    masked = EvaluationData(
        list(CLASSES), [tmp_path / "stripes.png"], ["a red"], [0], [()], [None], [tmp_path / "mask.png"], [None]
    )
    measures, _ = evaluate(ColourModel(), ColourTokenizer(), masked, Options(templates=["{}"]))
    assert [each[1:] for each in measures[-2:]] == [(1, pytest.approx(1 / 3), 1, 2)] * 2


def test_the_probe_swaps_unlike_images_of_a_sorted_file(tmp_path):
    # Six images of red and green, then six of blue and black, in batches of six.
    data = EvaluationData([])
    for number in range(12):
        left, right = ("red", "green") if number < 6 else ("blue", None)
        pixels = np.zeros((24, 24, 3), np.uint8)
        pixels[:, :12] = 255 * np.array(COLOURS[left])
        pixels[:, 12:] = 255 * np.array(COLOURS.get(right, (0, 0, 0)))
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        data.images.append(tmp_path / f"{number}.png")
        data.captions.append("red green" if number < 6 else "blue")
        data.image_index.append(number)
        for field in (data.objects, data.hard_negatives, data.masks, data.labels):
            field.append(() if field is data.objects else None)
    _, dependence = evaluate(ColourModel(), ColourTokenizer(), data, Options(batch_size=6))
    assert dependence.shuffled_gap.loss > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_refused_by_name(data, tmp_path, workers):
    broken = tmp_path / "broken.png"
    broken.write_bytes(data.images[0].read_bytes()[:60])
    bare = EvaluationData([], [broken], ["a red"], [0], [()], [None], [None], [None])
    with pytest.raises(DataError, match=r"^\S*broken\.png cannot be read as an image"):
        evaluate(ColourModel(), ColourTokenizer(), bare, Options(workers=workers))


class OddModel(ColourModel):
    """Patches of 8 pixels of an image of 30: the grid leaves out the last 6."""

    def __init__(self):
        super().__init__()
        self.visual = SimpleNamespace(
            preprocess_cfg={**self.visual.preprocess_cfg, "size": 30, "resize_mode": "squash"}, patch_size=8
        )

    def encode_patches(self, images):
        colours = reduce(images[..., :24, :24], "b c (h i) (w j) -> b (h w) c", "mean", i=8, j=8)
        return _with_black(colours), (3, 3)


@pytest.mark.parametrize("corner", [(0, 0), (0, 16), (8, 8), (16, 8), (16, 16)])
def test_boxes_and_masks_lie_on_the_patches_that_show_them_where_the_image_is_no_multiple_of_the_patch(
    tmp_path, corner
):
    top, left = corner
    pixels, mask = np.zeros((60, 30, 3), np.uint8), np.zeros((60, 30), np.uint8)
    # The image is squashed to half its height. The red is all that one patch shows, and nothing that another does.
    pixels[2 * top : 2 * top + 16, left : left + 8] = 255 * np.array(COLOURS["red"])
    mask[2 * top : 2 * top + 16, left : left + 8] = 1
    Image.fromarray(pixels).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    box = NamedObject("a red", (left + 2, 2 * top + 4, left + 6, 2 * top + 12), (1,))
    data = EvaluationData(
        ["red"], [tmp_path / "image.png"], ["a red"], [0], [(box,)], [None], [tmp_path / "mask.png"], [None]
    )
    options = Options(templates=["a {}"], background_threshold=0.5)
    measures, _ = evaluate(OddModel(), ColourTokenizer(), data, options)
    figures = {each.name: each for each in measures}
    for name in ("phrase_pointing", "phrase_tokens_pointing", "word_pointing"):
        assert figures[name][1:] == (1, pytest.approx(1 / 9), 1, 1)
    # Pixels beyond the grid have the label of the nearest patch: the outermost ones are 14 pixels long.
    drawn = (14 if top == 16 else 8) * (14 if left == 16 else 8)
    ceiling = (64 / drawn + (900 - drawn) / (900 - 64)) / 2 if drawn < 2 * 64 else (900 - 64) / 900 / 2
    assert figures["mean_iou_with_background"].ceiling == pytest.approx(ceiling)
    if corner == (8, 8):
        # (1 - y)(1 - x) > 1/2 at the distances y and x from the centre, in patches: 2 (1 - log 2) of a patch.
        drawn = 64 * 2 * (1 - np.log(2))
        value = (drawn / 64 + (900 - 64) / (900 - drawn)) / 2
        assert figures["mean_iou_with_background"].value == pytest.approx(value, abs=0.03)


def test_words_point_by_the_losss_product_not_by_cosine(data):
    class Bright(ColourModel):
        """The patches of red are longer than those of the word's very direction."""

        def encode_patches(self, images):
            patches, grid = super().encode_patches(images)
            return torch.where(patches[..., :1] == 1, torch.tensor([3.0, 0, 4, 0]), patches), grid

    # Red's patches have the product 4 with blue and the cosine 0.8, blue's have 1 of both.
    red, blue = (NamedObject("a blue", (left, 0, left + 32, 40), (1,)) for left in (0, 64))
    assert pointing(one_caption(data, "a blue", red), Bright())["word_pointing"][0] == 1
    assert pointing(one_caption(data, "a blue", red), Bright())["phrase_pointing"][0] == 0
    assert pointing(one_caption(data, "a blue", blue), Bright())["word_pointing"][0] == 0


def alike(folder, count, classes=()):
    """`count` images of one colour, a caption each, of the first class."""
    data = EvaluationData(list(classes))
    for number in range(count):
        Image.new("RGB", (24, 24), (255, 0, 0)).save(folder / f"{number}.png")
        data.images.append(folder / f"{number}.png")
        data.captions.append("a red")
        data.image_index.append(number)
        data.objects.append(())
        for field in (data.hard_negatives, data.masks):
            field.append(None)
        data.labels.append(0 if classes else None)
    return data


@pytest.mark.parametrize(("images", "ranks"), [(4, [1]), (5, [1, 5]), (9, [1, 5]), (10, [1, 5, 10])])
def test_recall_at_k_is_measured_from_k_images_on(tmp_path, images, ranks):
    measures, _ = evaluate(ColourModel(), ColourTokenizer(), alike(tmp_path, images))
    for way in ("image_to_text", "text_to_image"):
        assert [each.name for each in measures if way in each.name] == [f"{way}_R@{k}" for k in ranks]
    # All tie with all: nothing is found, unless all are.
    assert [each.value for each in measures if "R@" in each.name] == [float(k == images) for k in ranks] * 2
    assert [each.chance for each in measures if "R@" in each.name] == pytest.approx([k / images for k in ranks] * 2)


@pytest.mark.parametrize(("classes", "ranks"), [(4, [1]), (5, [1, 5]), (6, [1, 5])])
def test_top_k_is_measured_from_k_classes_on(tmp_path, classes, ranks):
    names = ["red", "green", "blue", "yellow", "red and red", "green and blue"][:classes]
    data = alike(tmp_path, 1, names)
    measures, _ = evaluate(ColourModel(), ColourTokenizer(), data, Options(templates=["{}"]))
    top = {each.name: each.chance for each in measures if "zero_shot" in each.name}
    assert top == {f"zero_shot_top{k}": pytest.approx(k / classes) for k in ranks}


def test_a_batch_is_sent_in_two_tensors_or_in_one_where_both_readings_are_the_same(data):
    for model, tensors in ((ColourModel(), 2), (OddModel(), 1)):
        (batch,) = image_batches(model, data.images, Options().batch_size, 0)
        assert batch.images.shape == batch.whole.shape == (2, 3, *[model.visual.preprocess_cfg["size"]] * 2)
        assert len({id(batch.images), id(batch.whole)}) == tensors
        assert sorted(batch.indices) == [0, 1]
        assert batch.sizes == ((48, 96), (48, 96))


def test_images_come_in_the_order_that_is_asked_for_and_as_often(data):
    order = [1, 0, 1, 1, 0]
    batches = list(image_batches(ColourModel(), data.images, 2, 0, own=False, order=order))
    assert [batch.indices for batch in batches] == [[1, 0], [1, 1], [0]]
    once = {i: batch.whole[0] for i in (0, 1) for batch in image_batches(ColourModel(), data.images, 1, 0, order=[i])}
    for batch in batches:
        for image, index in zip(batch.whole, batch.indices, strict=True):
            assert torch.equal(image, once[index])


def test_families_alone_are_measured_and_nothing_is_run_for_the_others(data, measured):
    def names(*families):
        model = CountingModel()
        measures, dependence = evaluate(model, ColourTokenizer(), data, Options(templates=["{}"], families=families))
        return [each.name for each in measures], dependence is not None, sorted(set(model.called))

    assert names("retrieval") == (["image_to_text_R@1", "text_to_image_R@1"], False, ["image", "text"])
    assert names("hard_negatives")[0] == ["hard_negative_accuracy"]
    assert names("pointing")[0] == [name for name in measured[0] if name.endswith("pointing")]
    assert names("segmentation") == (["mean_iou_of_objects", "mean_iou"], False, ["patches", "text"])
    assert names("image_dependence") == ([], True, ["patches", "tokens"])


class CountingModel(ColourModel):
    def __init__(self):
        super().__init__()
        self.called = []

    def encode_patches(self, images):
        self.called.append("patches")
        return super().encode_patches(images)

    def encode_image(self, images, normalize):
        self.called.append("image")
        return super().encode_image(images, normalize)

    def encode_tokens(self, texts):
        self.called.append("tokens")
        return super().encode_tokens(texts)

    def encode_text(self, texts, normalize):
        self.called.append("text")
        return torch.nn.functional.normalize(super().encode_tokens(texts)[0].sum(dim=1), dim=-1)


def test_the_reading_reaches_the_model(data):
    class Reading(ColourModel):
        def encode_patches(self, images, reading="last"):
            readings.append(reading)
            return super().encode_patches(images)

    readings = []
    for options in (Options(families=["pointing"]), Options(families=["pointing"], reading="clear")):
        evaluate(Reading(), ColourTokenizer(), data, options)
    assert readings == ["last", "clear"]


def test_an_unknown_family_is_refused(data):
    with pytest.raises(
        ValueError, match="families has 'colours'; expected of retrieval, faithfulness, hard_negatives,"
    ):
        evaluate(ColourModel(), ColourTokenizer(), data, Options(families=["colours"]))


def test_without_captions_classes_alone_are_measured(data):
    bare = EvaluationData(list(CLASSES), masks=data.masks, images=data.images, labels=[1, 1])
    measures, dependence = evaluate(ColourModel(), ColourTokenizer(), bare, Options(templates=["{}"]))
    assert [each.name for each in measures] == ["zero_shot_top1", "mean_iou_of_objects", "mean_iou"]
    assert dependence is None


def test_an_image_may_be_cropped_to_a_box(data):
    # Each of the three stripes of one image, by its box, is an image of one colour.
    stripes = EvaluationData(list(CLASSES))
    for index, colour in enumerate(STRIPES):
        image = stripes.add_image(data.images[0], label=index, crop=(32 * index, 0, 32 * index + 32, 40))
        stripes.add_caption(image, f"a {colour}")
    measures, _ = evaluate(ColourModel(), ColourTokenizer(), stripes, Options(templates=["{}"]))
    found = {each.name: each.value for each in measures}
    assert found["zero_shot_top1"] == found["image_to_text_R@1"] == found["text_to_image_R@1"] == 1


def test_hard_negatives_are_also_averaged_over_their_groups(data):
    grouped = EvaluationData([])
    image = grouped.add_image(data.images[0], crop=(0, 0, 32, 40))  # red
    for caption, negative, group in (
        ("a red", "a green", "easy"),
        ("a red", "a blue", "easy"),
        ("a red", "a green", "easy"),
        ("a green", "a red", "wrong"),
        ("a green", "a red", None),
    ):
        grouped.add_caption(image, caption, hard_negative=negative, group=group)
    measures, _ = evaluate(ColourModel(), ColourTokenizer(), grouped, Options(families=["hard_negatives"]))
    assert [(each.name, each.value, each.count) for each in measures] == [
        ("hard_negative_accuracy", pytest.approx(3 / 5), 5),
        ("hard_negative_accuracy_of_groups", pytest.approx(1 / 2), 2),
    ]


@pytest.mark.slow
def test_workers_do_not_show(data, measured):
    options = Options(
        templates=["a {}", "{}"], background_threshold=0.5, nouns_and_adjectives=set(COLOURS), batch_size=2, workers=2
    )
    measures, dependence = evaluate(ColourModel(), ColourTokenizer(), data, options)
    assert {each.name: each for each in measures} == measured[0]
    assert dependence == measured[1]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_any_kind_in_reading_names_the_image(bare, monkeypatch, workers):
    def fail(image):
        raise MemoryError

    monkeypatch.setattr("sparc_loss.evaluation.image_batches.preprocessing_of", lambda *_, **__: fail)
    with pytest.raises(DataError, match=r"^\S*\d\.png cannot be read: MemoryError"):
        evaluate(ColourModel(), ColourTokenizer(), bare, Options(workers=workers))
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_batch_that_cannot_be_sent_ends_the_wait(bare, monkeypatch):
    def refuse(tensor):
        raise RuntimeError("unable to open shared memory object: Too many open files (24)")

    monkeypatch.setitem(ForkingPickler._extra_reducers, torch.Tensor, refuse)
    with pytest.raises(DataError, match=r"^the images cannot be read: RuntimeError: .* Too many open files"):
        evaluate(ColourModel(), ColourTokenizer(), bare, Options(workers=1))


@pytest.mark.slow
def test_a_worker_that_dies_while_the_model_runs_is_one_error(bare):
    class Deadly(ColourModel):
        def encode_image(self, images, normalize):
            multiprocessing.active_children()[0].kill()
            time.sleep(60)  # ends with the signal that a child has died

    with pytest.raises(DataError, match=r"^the images cannot be read: RuntimeError: DataLoader worker .* Killed"):
        evaluate(Deadly(), ColourTokenizer(), bare, Options(workers=1, batch_size=1))


@pytest.mark.slow
def test_errors_of_the_model_are_its_own(bare):
    class Broken(ColourModel):
        def encode_image(self, images, normalize):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(Broken(), ColourTokenizer(), bare, Options(workers=1))


def test_token_embeddings_of_phrases_are_summed_batch_by_batch(data):
    class Counting(ColourModel):
        largest = 0

        def encode_tokens(self, texts):
            self.largest = max(self.largest, len(texts))
            return super().encode_tokens(texts)

    phrases = [f"{one} and {two}" for one in COLOURS for two in COLOURS]
    features, mask = ColourModel().encode_tokens(ColourTokenizer()(phrases))
    for batch_size in (1, 3, 64):
        model = Counting()
        encoder = Encoder(model, ColourTokenizer(), batch_size)
        assert torch.equal(encoder.token_sums(phrases, "phrases"), (features * mask.unsqueeze(-1)).sum(dim=1))
        assert model.largest == min(batch_size, len(phrases))


def test_token_embeddings_of_phrases_are_not_kept(data):
    class Watching(ColourModel):
        given, most = (), 0

        def encode_tokens(self, texts):
            features, mask = super().encode_tokens(texts)
            self.most = max(self.most, sum(each() is not None for each in self.given))
            self.given = (*self.given, weakref.ref(features))
            return features, mask

    model = Watching()
    objects = [NamedObject(f"a {colour}", (0, 0, 32, 40)) for colour in COLOURS]
    evaluate(model, ColourTokenizer(), one_caption(data, "a red", *objects), Options(batch_size=1))
    assert len(model.given) > len(objects)
    assert model.most <= 1
