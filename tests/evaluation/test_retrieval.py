"""Recall@k both ways, against examples worked by hand."""

import pytest
import torch
from largest_tensor import LargestTensor

from sparc_loss.evaluation import nearest_captions, recall_at_k, recall_chance, top_k_accuracy


def directions(*degrees: float) -> torch.Tensor:
    """Unit vectors of the plane: the nearer the angles, the more similar."""
    angles = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def test_both_ways_differ_where_hubs_do():
    # Image 0 (0 degrees) is nearest to caption 1 (10), image 1 (20) likewise; each caption is nearest to its own image
    # but caption 0 (-70), which is still nearest to image 0.
    images, texts = directions(0, 20), directions(-70, 10.5)
    assert recall_at_k(images, texts) == (0.5, 1.0)


def test_at_n_everything_is_found():
    assert recall_at_k(torch.randn(5, 3), torch.randn(5, 3), k=5) == (1.0, 1.0)


def test_grows_with_k_as_worked_by_hand():
    # Captions by distance from the images: image 0: 1, 0, 2. Image 1: 1, 2, 0. Image 2: 0, 1, 2.
    images, texts = directions(0, 45, -60), directions(-30, 20, 80)
    assert [recall_at_k(images, texts, k).image_to_text for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])


def test_scale_of_the_features_does_not_matter():
    images, texts = torch.randn(20, 4), torch.randn(20, 4)
    scales = torch.rand(20, 1) + 0.5
    assert recall_at_k(images * scales, texts / scales) == recall_at_k(images, texts)


def test_a_collapsed_model_scores_nothing():
    assert recall_at_k(torch.ones(6, 3), torch.ones(6, 3)) == (0.0, 0.0)


def test_a_duplicate_of_the_right_caption_counts_against_it():
    images, texts = directions(0, 90, 2), directions(0, 90, 0)
    assert recall_at_k(images, texts).image_to_text == pytest.approx(1 / 3)
    assert recall_at_k(images, texts, k=2).image_to_text == 1


def test_ties_by_rounding_are_ties():
    text = torch.randn(1, 64)
    texts = torch.cat([text, text + 1e-8 * torch.randn(1, 64)])
    assert recall_at_k(texts, texts.flip(0)) == (0.0, 0.0)


def test_chunks_do_not_show(monkeypatch):
    images, texts = torch.randn(50, 8), torch.randn(50, 8)
    whole = recall_at_k(images, images + texts)
    monkeypatch.setattr("sparc_loss.evaluation.retrieval._CHUNK", 7)
    assert recall_at_k(images, images + texts) == whole


# 2 queries at a time, then 1, though that is more than allowed.
@pytest.mark.parametrize(("similarities", "queries"), [(60, 2), (5, 1)])
def test_the_similarities_in_memory_do_not_grow_with_the_candidates(monkeypatch, similarities, queries):
    images, texts = torch.randn(30, 8), torch.randn(30, 8)
    expected = recall_at_k(images, texts, 3), nearest_captions(images, texts)
    sizes, matmul = [], torch.Tensor.__matmul__
    monkeypatch.setattr("sparc_loss.evaluation.retrieval._SIMILARITIES", similarities)
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: sizes.append(len(a)) or matmul(a, b))
    assert recall_at_k(images, texts, 3) == expected[0]
    assert torch.equal(nearest_captions(images, texts), expected[1])
    assert max(sizes) == queries


def test_random_features_score_chance():
    recall = recall_at_k(torch.randn(2000, 32), torch.randn(2000, 32), k=400)
    assert recall == pytest.approx((recall_chance(2000, 400),) * 2, abs=0.04)


def test_any_of_an_images_captions_is_right_and_each_caption_seeks_its_image():
    # Image 0 (0 degrees) has the captions at 80 and 10, image 1 (90) those at 60 and 40: 40 is nearer to image 0.
    images, texts = directions(0, 90), directions(80, 10, 60, 40)
    recall = recall_at_k(images, texts, image_index=torch.tensor([0, 0, 1, 1]))
    assert recall == (0.5, 0.5)  # image 1 finds 80 first; 80 finds image 1 first, and 40 image 0


def test_captions_of_one_image_do_not_compete():
    images, texts = directions(0, 90), directions(0, 0, 0, 90)
    assert recall_at_k(images, texts, image_index=torch.tensor([0, 0, 0, 1])) == (1.0, 1.0)


def test_a_caption_of_another_image_that_ties_with_the_own_ones_comes_first():
    images, texts = directions(0, 90), directions(0, 0, 0)
    index = torch.tensor([0, 0, 1])
    assert recall_at_k(images, texts, image_index=index).image_to_text == 0
    # One wrong caption ties with image 0's own, two with image 1's.
    assert recall_at_k(images, texts, 2, image_index=index).image_to_text == 0.5


def test_captions_may_stand_in_any_order():
    images, texts, index = torch.randn(6, 4), torch.randn(18, 4), torch.arange(6).repeat(3)
    order = torch.randperm(18)
    for k in (1, 2, 5):
        shuffled = recall_at_k(images, texts[order], k, image_index=index[order])
        assert shuffled == recall_at_k(images, texts, k, image_index=index)


@pytest.mark.parametrize("k", [1, 3])
def test_agrees_with_scikit_learn_where_nothing_ties(k):
    metrics = pytest.importorskip("sklearn.metrics")
    images, texts = torch.randn(40, 5, dtype=torch.float64), torch.randn(40, 5, dtype=torch.float64)
    cosine = torch.nn.functional.cosine_similarity(images[:, None], texts[None], dim=-1)
    labels = list(range(40))
    expected = [metrics.top_k_accuracy_score(labels, scores, k=k, labels=labels) for scores in (cosine, cosine.T)]
    assert recall_at_k(images, texts, k) == pytest.approx(expected)


def test_random_captions_score_chance_where_images_have_several():
    index = torch.arange(300).repeat_interleave(5)
    recall = recall_at_k(torch.randn(300, 64), torch.randn(1500, 64), k=60, image_index=index)
    assert recall.image_to_text == pytest.approx(recall_chance(1500, 60, right=5), abs=0.07)
    assert recall.text_to_image == pytest.approx(recall_chance(300, 60), abs=0.04)


def test_chance_by_hand():
    assert recall_chance(4, 2) == pytest.approx(1 / 2)
    # Of the 6 pairs of 4 candidates, 1 has neither of the 2 right ones.
    assert recall_chance(4, 2, right=2) == pytest.approx(5 / 6)
    assert recall_chance(4, 3, right=2) == 1


def test_the_nearest_caption_of_each_image():
    images, texts = directions(0, 90), directions(80, 10, 60, 40)
    assert nearest_captions(images, texts, torch.tensor([0, 0, 1, 1])).tolist() == [1, 0]


def test_a_tie_for_the_nearest_goes_to_another_images_caption():
    assert nearest_captions(directions(0, 90), directions(0, 0)).tolist() == [1, 0]


def test_chunks_of_nearest_captions_do_not_show(monkeypatch):
    images, texts = torch.ones(9, 3), torch.ones(9, 3)
    whole = nearest_captions(images, texts)
    monkeypatch.setattr("sparc_loss.evaluation.retrieval._CHUNK", 4)
    assert torch.equal(nearest_captions(images, texts), whole)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ([0, 0, 0], ValueError, "image_index gives image 1 no caption; expected each of the images 0 to 1 at least"),
        ([0, 1, 2], ValueError, "image_index names image 2; expected each of the images 0 to 1 at least once"),
        ([0, 1], ValueError, r"image_index has shape \[2\] on cpu; expected one image per caption, \[3\]"),
        ([0.0, 1.0, 1.0], TypeError, r"image_index has dtype torch\.float32; expected a tensor of torch\.int64"),
    ],
)
def test_an_image_index_that_does_not_fit_is_refused(index, error, message):
    with pytest.raises(error, match=message):
        recall_at_k(torch.ones(2, 2), torch.ones(3, 2), image_index=torch.tensor(index))


def test_more_right_candidates_than_candidates_are_refused():
    with pytest.raises(ValueError, match="right is 4 with 3 candidates; expected 1 to"):
        recall_chance(3, 1, right=4)


@pytest.mark.parametrize("k", [0, 4])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match=f"k is {k} with 3 candidates; expected 1 to"):
        recall_at_k(torch.ones(3, 2), torch.ones(3, 2), k)


def test_k_of_another_type_is_refused():
    with pytest.raises(TypeError, match=r"k is 1\.0 \(float\); expected an int"):
        recall_at_k(torch.ones(3, 2), torch.ones(3, 2), 1.0)


def test_unpaired_features_are_refused():
    with pytest.raises(ValueError, match=r"text_features has N = 4 in shape \[4, 2\], image_features has N = 3"):
        recall_at_k(torch.ones(3, 2), torch.ones(4, 2))


def test_nan_is_refused():
    with pytest.raises(ValueError, match="text_features has values that are not finite"):
        recall_at_k(torch.ones(2, 2), torch.full((2, 2), torch.nan))


@pytest.mark.parametrize("k", [1, 5])
def test_recall_equals_that_of_clip_benchmark(k):
    metrics = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval", reason="pip install clip-benchmark")
    images, texts = random_features(40, 200)
    index = torch.arange(200) % 40
    scores = torch.nn.functional.normalize(texts, dim=-1) @ torch.nn.functional.normalize(images, dim=-1).T
    positive = torch.nn.functional.one_hot(index, 40).bool()
    # Its figure is 1 for a query that finds any of its counterparts.
    found = [
        (metrics.recall_at_k(*each, k) > 0).float().mean().item()
        for each in ((scores.T, positive.T), (scores, positive))
    ]
    assert recall_at_k(images, texts, k, index) == pytest.approx(tuple(found))


def random_features(images, texts):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(images, 8, generator=generator), torch.randn(texts, 8, generator=generator)


@pytest.mark.parametrize("measure", ["recall", "nearest", "top_k"])
def test_memory_has_a_bound_whatever_the_numbers(measure):
    images, texts = random_features(5000, 25_000)
    index = torch.arange(25_000) % 5000
    run = {
        "recall": lambda: recall_at_k(images, texts, 1, index),
        "nearest": lambda: nearest_captions(images, texts, index),
        "top_k": lambda: top_k_accuracy(texts, images, index, 1),
    }[measure]
    with LargestTensor() as mode:
        run()
    # All similarities at once would be 125 million.
    assert mode.elements <= 1 << 24
