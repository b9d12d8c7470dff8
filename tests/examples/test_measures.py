"""The measures of the scenes, on embeddings made by hand."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from examples.scenes import emoji
from examples.scenes.dataset import Annotations
from examples.scenes.digits import COLOURS, KINDS
from examples.scenes.measures import (
    MEASURES,
    PROBE_SCALE,
    Embeddings,
    _mean_iou_by_threshold,
    best_background_threshold,
    levels,
    measure,
    measures_table,
)
from examples.scenes.scene import generate_scene
from examples.scenes.world import World
from examples.scenes.worlds import WORLDS
from sparc_loss.evaluation import BACKGROUND, image_dependence, intersection_and_union, mean_iou, segment

# What only one world has.
OF_WORLD = {"digits": {"colour_word_pointing"}, "emoji": {"new_pair_pointing"}}
LOSSES = {name for name in MEASURES if name.endswith("_loss")}
GRID = (8, 8)
CENTRES = np.arange(8) * 8 + 4


@pytest.fixture(scope="module", params=WORLDS)
def world(request) -> World:
    return WORLDS[request.param]


@pytest.fixture(scope="module")
def measures(world) -> list[str]:
    of_others = {name for other, names in OF_WORLD.items() if other != world.name for name in names}
    return [name for name in MEASURES if name not in of_others]


@pytest.fixture(scope="module")
def scenes(world) -> Annotations:
    made = [generate_scene(world, "val", index) for index in range(24)]
    return Annotations(
        [Path()] * len(made),
        [scene.caption for scene in made],
        [scene.objects for scene in made],
        np.stack([scene.labels for scene in made]),
    )


@pytest.fixture(scope="module")
def knowing(scenes: Annotations) -> Embeddings:
    """A model that knows all: patches whose centre is in an object's box, its phrase and its words are one vector."""
    phrases = sorted({each.phrase for objects in scenes.objects for each in objects})
    dim = len(phrases) + 32
    patch_features = torch.zeros(len(scenes.captions), 64, dim)
    token_features = torch.zeros(len(scenes.captions), 25, dim)
    mask = torch.zeros(len(scenes.captions), 25, dtype=torch.bool)
    for index, (caption, objects) in enumerate(zip(scenes.captions, scenes.objects, strict=True)):
        mask[index, : len(caption.split())] = True
        token_features[index, :, len(phrases) :][mask[index]] = torch.eye(32)[: mask[index].sum()]
        for each in objects:
            for left, top, right, bottom in each.boxes:
                rows, columns = (top <= CENTRES) & (bottom > CENTRES), (left <= CENTRES) & (right > CENTRES)
                inside = torch.from_numpy((rows[:, None] & columns[None, :]).ravel())
                patch_features[index, inside, phrases.index(each.phrase)] = 1
            for word in each.words.values():
                token_features[index, word] = one_hot(torch.tensor(phrases.index(each.phrase)), dim).float()
    features = torch.eye(2 * len(scenes.captions))
    own, others = features.split(len(scenes.captions))
    return Embeddings(
        own,
        own,
        patch_features,
        token_features,
        mask,
        [[[word] for word in range(len(caption.split()))] for caption in scenes.captions],
        {index: other for index, other in enumerate(others) if index % 2},
        torch.eye(len(phrases), dim),
        3 * torch.eye(len(phrases), dim),
        phrases,
        GRID,
    )


def test_every_measure_of_the_world_has_a_title_a_chance_and_a_ceiling(knowing, scenes, measures):
    figures, level = measure(knowing, scenes, 0.5), levels(knowing, scenes)
    assert set(figures) == set(level) == set(measures)
    assert all(0 <= level[name].chance < level[name].ceiling <= 1 for name in set(measures) - LOSSES)
    assert all(level[name].chance > level[name].ceiling == 0 for name in LOSSES)


def test_a_model_that_knows_all_reaches_the_ceilings(knowing, scenes, measures):
    figures, level = measure(knowing, scenes, 0.5), levels(knowing, scenes)
    of_the_probe = {name for name in measures if "images" in name}
    for name in set(measures) - {"mean_iou"} - of_the_probe:
        assert figures[name] == pytest.approx(level[name].ceiling), name


def test_a_model_of_one_point_has_no_hit(knowing, scenes):
    constant = {
        name: torch.ones_like(value) for name, value in vars(knowing).items() if isinstance(value, torch.Tensor)
    }
    constant["token_mask"] = knowing.token_mask
    constant["swapped"] = {index: torch.ones_like(value) for index, value in knowing.swapped.items()}
    figures = measure(Embeddings(**{**vars(knowing), **constant}), scenes, 0.5)
    assert {name for name, figure in figures.items() if figure > 0} <= {"k_precision", "mean_iou", *LOSSES}
    level = levels(knowing, scenes)
    assert {name: figures[name] for name in LOSSES} == pytest.approx({name: level[name].chance for name in LOSSES})


def test_retrieval_is_told_apart_by_its_direction(knowing, scenes):
    texts = knowing.text_features.clone()
    texts[1] = texts[0]  # images 0 and 1 find neither of the two for certain, caption 0 still finds its image
    figures = measure(replace(knowing, text_features=texts), scenes, 0.5)
    count = len(scenes.captions)
    assert figures["image_to_text_recall"] == pytest.approx((count - 2) / count)
    assert figures["text_to_image_recall"] == pytest.approx((count - 1) / count)


def test_k_precision_counts_what_is_told_of_objects(knowing, scenes, world):
    nouns = {
        "digits": {*COLOURS, *KINDS},
        "emoji": {name for noun, (plural, _) in emoji._NOUNS.items() for name in (noun, plural)},
    }
    told = {*nouns[world.name], "small", "little", "tiny", "large", "big", "huge"}
    words = [[word.strip(",") for word in caption.split() if word.strip(",") in told] for caption in scenes.captions]

    def said(retrieved: int, image: int) -> float:
        return sum(word in words[image] for word in words[retrieved]) / len(words[retrieved])

    figures = measure(replace(knowing, text_features=knowing.text_features.roll(1, dims=0)), scenes, 0.5)
    images = range(len(words))
    assert figures["k_precision"] == pytest.approx(sum(said((i + 1) % len(words), i) for i in images) / len(words))
    chance = sum(said(caption, image) for caption in images for image in images) / len(words) ** 2
    assert levels(knowing, scenes)["k_precision"].chance == pytest.approx(chance)


def test_words_of_colour_and_of_kind_are_told_apart(knowing, scenes, world):
    tokens = knowing.token_features.clone()
    for index, objects in enumerate(scenes.objects):
        tokens[index, [each.words["kind"] for each in objects]] = 0
    figures = measure(replace(knowing, token_features=tokens), scenes, 0.5)
    assert figures["kind_word_pointing"] == 0
    if world.name == "digits":
        ceiling = levels(knowing, scenes)["colour_word_pointing"].ceiling
        assert figures["colour_word_pointing"] == pytest.approx(ceiling)
    else:
        assert figures["new_pair_pointing"] == 0


def test_phrases_are_told_from_the_mean_of_their_tokens(knowing, scenes):
    without = replace(knowing, phrase_token_features=torch.zeros_like(knowing.phrase_token_features))
    figures = measure(without, scenes, 0.5)
    assert figures["phrase_tokens_pointing"] == 0
    assert figures["phrase_pointing"] > 0.9


def test_only_phrases_of_the_scene_are_segmented(knowing, scenes):
    absent = next(i for i, name in enumerate(knowing.phrases) if name not in {o.phrase for o in scenes.objects[0]})
    one = Annotations(*(part[:1] for part in vars(scenes).values()))
    patches = knowing.patch_features[:1] + 0.01
    known = replace(knowing, patch_features=patches)
    phrases = knowing.phrase_features.clone()
    phrases[absent] = 1.0  # resembles every patch of no object most
    with_absent = _mean_iou_by_threshold(replace(known, phrase_features=phrases), one, [0.3])
    assert with_absent == _mean_iou_by_threshold(known, one, [0.3])


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_what_is_less_similar_than_the_threshold_is_background(knowing, scenes, threshold):
    totals = 0
    for patches, labels, objects in zip(knowing.patch_features, scenes.labels, scenes.objects, strict=True):
        present = [knowing.phrases.index(each.phrase) for each in objects]
        predicted, _ = segment(
            patches, knowing.phrase_features, GRID, (64, 64), present=present, background_threshold=threshold
        )
        target = torch.tensor([BACKGROUND, *present])[torch.from_numpy(labels.astype(np.int64))]
        totals = totals + torch.stack(intersection_and_union(predicted, target, len(knowing.phrases)))
    expected = mean_iou(*totals, background=True)
    assert measure(knowing, scenes, threshold)["mean_iou"] == pytest.approx(expected)
    # A model that knows where the objects are draws most of them; the other way round it would draw none.
    assert expected > 0.3


def test_words_point_by_the_losss_product_not_by_cosine(knowing, scenes):
    # Patches of no object are as similar to every word, and longer: by cosine they would be the least similar.
    patches = knowing.patch_features.clone()
    patches[patches.norm(dim=-1) == 0] = 100.0
    figures = measure(replace(knowing, patch_features=patches), scenes, 0.5)
    assert figures["kind_word_pointing"] == 0
    assert figures["phrase_pointing"] == pytest.approx(levels(knowing, scenes)["phrase_pointing"].ceiling)


def test_chance_of_segmentation_is_any_label_of_the_scene_or_background(knowing, scenes):
    intersection, union = defaultdict(float), defaultdict(float)
    for labels, objects in zip(scenes.labels, scenes.objects, strict=True):
        drawn = labels.size / (len(objects) + 1)
        for number, name in enumerate(["background", *(each.phrase for each in objects)]):
            pixels = (labels == number).sum()
            intersection[name] += pixels / (len(objects) + 1)
            union[name] += pixels + drawn - pixels / (len(objects) + 1)
    expected = np.mean([intersection[name] / union[name] for name in union])
    assert levels(knowing, scenes)["mean_iou"].chance == pytest.approx(expected)


def test_the_probe_tells_how_often_a_token_finds_its_group_and_the_loss(knowing, scenes):
    patches, tokens = torch.randn(len(scenes.captions), 64, 3), torch.randn(*knowing.token_mask.shape, 3)
    figures = measure(
        replace(knowing, patch_features=patches, token_features=tokens, **random_phrases(knowing)), scenes, 0
    )
    probe = image_dependence(patches, tokens, knowing.token_mask, PROBE_SCALE)
    for name in ("right", "shuffled", "constant"):
        assert figures[f"{name}_images"] == pytest.approx(getattr(probe, name).token_accuracy)
        assert figures[f"{name}_images_loss"] == pytest.approx(getattr(probe, name).loss)
    assert len({probe.right.token_accuracy, probe.shuffled.token_accuracy, probe.constant.token_accuracy}) == 3
    assert probe.right.token_accuracy != probe.right.group_accuracy


def random_phrases(embeddings):
    return {name: torch.randn(len(embeddings.phrases), 3) for name in ("phrase_features", "phrase_token_features")}


def test_the_background_threshold_is_the_best_of_the_split(knowing, scenes):
    threshold = best_background_threshold(knowing, scenes)
    best = measure(knowing, scenes, threshold)["mean_iou"]
    others = [measure(knowing, scenes, other)["mean_iou"] for other in (-0.5, 0.2, 0.9)]
    assert all(other <= best for other in others)
    assert others[0] < best  # below every cosine nothing is background


def test_the_table_has_a_row_for_each_measure_and_a_column_for_each_model(knowing, scenes, measures):
    figures = measure(knowing, scenes, 0.5)
    lines = measures_table({"one": figures, "two": figures}).splitlines()
    assert lines[0].split("|")[2:4] == ["   one ", "   two "]
    assert [line.split("|")[1].strip() for line in lines[2:]] == [MEASURES[name] for name in measures]
    assert "| 1.000 | 1.000 |" in lines[2]
