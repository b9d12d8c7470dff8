"""Recall@k both ways, against examples worked by hand."""

import pytest
import torch

from sparc_loss.evaluation import recall_at_k, recall_chance


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


def test_random_features_score_chance():
    recall = recall_at_k(torch.randn(2000, 32), torch.randn(2000, 32), k=400)
    assert recall == pytest.approx((recall_chance(2000, 400),) * 2, abs=0.04)


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
