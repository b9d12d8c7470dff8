"""PaclLoss: patches pooled for each caption."""

import re
from unittest import mock

import baseline_reference
import pytest
import torch
from baseline_outputs import assert_same_value_and_gradient, baseline_outputs, random_outputs
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from sparc_loss.losses import PaclLoss, all_pairs
from sparc_loss.losses.pacl import WEIGHTINGS, pooled_cosine


@given(baseline_outputs(), st.sampled_from(WEIGHTINGS), st.sampled_from([1, 30, 2**24]))
def test_value_and_gradient_are_the_slow_references(outputs, weighting, block_numbers):
    with mock.patch.object(all_pairs, "BLOCK_NUMBERS", block_numbers):
        assert_same_value_and_gradient(
            lambda outputs: PaclLoss(weighting=weighting)(**outputs),
            lambda outputs: baseline_reference.pacl(outputs, weighting),
            outputs,
        )


@given(baseline_outputs(zero_vectors=True), st.sampled_from(WEIGHTINGS))
def test_a_zero_vector_has_cosine_zero_with_everything(outputs, weighting):
    expected = baseline_reference.pacl(outputs, weighting)
    assert_close(PaclLoss(weighting=weighting)(**outputs), expected, rtol=1e-9, atol=1e-9)


def pool(patches, weighting):
    text = torch.tensor([[1.0, 0.0]])
    return pooled_cosine(
        torch.tensor([patches]), torch.ones(1, len(patches), dtype=torch.bool), text, weighting
    ).item()


def test_weights_worked_by_hand():
    # Patches along and across the text: weights 1 and 0, sigmoid(1) and 1/2, softmax e/(e+1) and 1/(e+1).
    along, across = [1.0, 0.0], [0.0, 2.0]
    assert pool([along, across], "cosine") == pytest.approx(1)
    assert pool([along, across], "sigmoid") == pytest.approx(0.731059 / (0.731059**2 + 1) ** 0.5, rel=1e-5)
    assert pool([along, across], "softmax") == pytest.approx(2.718282 / (2.718282**2 + 4) ** 0.5, rel=1e-5)


def test_with_cosine_weights_a_patch_and_its_opposite_count_the_same_with_the_others_not():
    patches, opposite = [[1.0, 1.0], [2.0, -1.0]], [[-1.0, -1.0], [2.0, -1.0]]
    assert pool(patches, "cosine") == pytest.approx(pool(opposite, "cosine"))
    for weighting in ("sigmoid", "softmax"):
        assert pool(patches, weighting) != pytest.approx(pool(opposite, weighting), abs=0.1)


def test_a_caption_without_tokens_still_counts_by_its_global_embedding():
    outputs = random_outputs()
    expected = PaclLoss()(**outputs)
    outputs["token_mask"] = torch.zeros_like(outputs["token_mask"])
    assert torch.equal(PaclLoss()(**outputs), expected)


def test_an_unknown_weighting_is_refused():
    message = "weighting is 'max'; expected one of 'cosine', 'sigmoid', 'softmax'"
    with pytest.raises(ValueError, match=re.escape(message)):
        PaclLoss(weighting="max")


def test_global_and_patch_embeddings_of_different_sizes_are_refused():
    outputs = random_outputs()
    for name in ("image_features", "text_features"):
        outputs[name] = outputs[name][:, :4]
    with pytest.raises(ValueError, match="patch_features has D = 6 in shape"):
        PaclLoss()(**outputs)
