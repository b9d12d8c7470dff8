"""The measures of the digit scenes, on embeddings made by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from examples.digit_scenes.dataset import Annotations
from examples.digit_scenes.measures import (
    MEASURES,
    Embeddings,
    best_background_threshold,
    levels,
    markdown_table,
    measure,
)
from examples.digit_scenes.scenes import generate_scene

GRID = (8, 8)
CENTRES = np.arange(8) * 8 + 4


@pytest.fixture(scope="module")
def scenes() -> Annotations:
    made = [generate_scene("val", index) for index in range(24)]
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
            left, top, right, bottom = each.box
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


def test_every_measure_has_a_title_a_chance_and_a_ceiling(knowing, scenes):
    figures, level = measure(knowing, scenes, 0.5), levels(knowing, scenes)
    assert set(figures) == set(level) == set(MEASURES)
    assert all(0 <= chance < ceiling <= 1 for chance, ceiling in level.values())


def test_a_model_that_knows_all_reaches_the_ceilings(knowing, scenes):
    figures, level = measure(knowing, scenes, 0.5), levels(knowing, scenes)
    for name in set(MEASURES) - {"mean_iou", "right_images", "shuffled_images", "constant_images"}:
        assert figures[name] == pytest.approx(level[name].ceiling), name


def test_a_model_of_one_point_has_no_hit(knowing, scenes):
    constant = {
        name: torch.ones_like(value) for name, value in vars(knowing).items() if isinstance(value, torch.Tensor)
    }
    constant["token_mask"] = knowing.token_mask
    constant["swapped"] = {index: torch.ones_like(value) for index, value in knowing.swapped.items()}
    figures = measure(Embeddings(**{**vars(knowing), **constant}), scenes, 0.5)
    assert {name for name, figure in figures.items() if figure > 0} <= {"k_precision", "mean_iou"}


def test_the_background_threshold_is_the_best_of_the_split(knowing, scenes):
    threshold = best_background_threshold(knowing, scenes)
    best = measure(knowing, scenes, threshold)["mean_iou"]
    assert all(measure(knowing, scenes, other)["mean_iou"] <= best for other in (-0.5, 0.2, 0.9))


def test_the_table_has_a_row_for_each_measure_and_a_column_for_each_model(knowing, scenes):
    figures = measure(knowing, scenes, 0.5)
    lines = markdown_table({"one": figures, "two": figures}).splitlines()
    assert lines[0].split("|")[2:4] == ["     one ", "     two "]
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(MEASURES.values())
    assert "|   1.000 |   1.000 |" in lines[2]
