"""GloriaLoss: attention of tokens to patches, matched by a soft maximum."""

import math
import re
from unittest import mock

import baseline_reference
import pytest
import torch
from baseline_outputs import assert_same_value_and_gradient, baseline_outputs, random_outputs
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from sparc_loss.losses import GloriaLoss, all_pairs
from sparc_loss.losses.gloria import attention_match


@given(baseline_outputs(), st.sampled_from([1.0, 5.0]), st.sampled_from([1, 30, 2**24]))
def test_value_and_gradient_are_the_slow_references(outputs, matching_scale, block_numbers):
    with mock.patch.object(all_pairs, "BLOCK_NUMBERS", block_numbers):
        assert_same_value_and_gradient(
            lambda outputs: GloriaLoss(global_weight=0, matching_scale=matching_scale)(**outputs),
            lambda outputs: baseline_reference.gloria(outputs, matching_scale),
            outputs,
        )


@given(baseline_outputs(zero_vectors=True))
def test_a_zero_vector_has_cosine_zero_with_everything(outputs):
    expected = baseline_reference.gloria(outputs)
    assert_close(GloriaLoss(global_weight=0)(**outputs), expected, rtol=1e-9, atol=1e-9)


def test_a_match_worked_by_hand():
    # One token (2, 0) and patches (1, 0), (0, 1): similarities 2 / sqrt(2) and 0.
    weight = 1 / (1 + math.exp(-math.sqrt(2)))
    cosine = weight / math.hypot(weight, 1 - weight)
    seen = torch.ones(1, 2, dtype=torch.bool)
    tokens = torch.tensor([[[2.0, 0.0], [2.0, 0.0]]])
    one = attention_match(torch.eye(2)[None], seen, tokens[:, :1], seen[:, :1], 5.0)
    two = attention_match(torch.eye(2)[None], seen, tokens, seen, 5.0)
    assert one.item() == pytest.approx(cosine)
    assert two.item() == pytest.approx(cosine + math.log(2) / 5)


def test_the_global_loss_is_in_by_default_and_out_by_its_weight():
    outputs = random_outputs()
    assert GloriaLoss()(**outputs, output_dict=True)["contrastive_loss"] > 0
    assert GloriaLoss(global_weight=0)(**outputs, output_dict=True)["contrastive_loss"] == 0


@pytest.mark.parametrize(
    ("matching_scale", "error", "message"),
    [
        (0, ValueError, "matching_scale is 0; expected a number above 0"),
        (-1.0, ValueError, "matching_scale is -1.0; expected a number above 0"),
        (None, TypeError, "matching_scale is None (NoneType); expected a number"),
    ],
)
def test_a_bad_matching_scale_is_refused(matching_scale, error, message):
    with pytest.raises(error, match=re.escape(message)):
        GloriaLoss(matching_scale=matching_scale)
