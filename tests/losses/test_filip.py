"""FilipLoss: late interaction of patches and tokens, and its token dropping."""

import re
from unittest import mock

import baseline_reference
import pytest
import torch
from baseline_outputs import assert_same_value_and_gradient, baseline_outputs, random_outputs
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from sparc_loss.losses import FilipLoss, all_pairs
from sparc_loss.losses.filip import with_dropped


def loss_of(outputs):
    return FilipLoss(token_dropping=0)(**outputs)


@given(baseline_outputs(), st.sampled_from([1, 30, 2**24]))
def test_value_and_gradient_are_the_slow_references(outputs, block_numbers):
    with mock.patch.object(all_pairs, "BLOCK_NUMBERS", block_numbers):
        assert_same_value_and_gradient(loss_of, baseline_reference.filip, outputs)


@given(baseline_outputs(zero_vectors=True))
def test_a_zero_vector_has_cosine_zero_with_everything(outputs):
    assert_close(loss_of(outputs), baseline_reference.filip(outputs), rtol=1e-9, atol=1e-9)


def test_two_pairs_worked_by_hand():
    # Cosines: image 1 with caption 1 is 1 both ways. Its patches reach caption 2's tokens (x, y) by 1 and 0: mean .5;
    # caption 2's tokens reach image 1's patches by 1 and 0: mean .5.
    x, y, z = torch.eye(3).tolist()
    outputs = {
        "image_features": torch.eye(2, 3),
        "text_features": torch.eye(2, 3),
        "logit_scale": torch.tensor(2.0),
        "patch_features": torch.tensor([[x, z], [x, y]]),
        "token_features": torch.tensor([[x, z], [x, y]]) * 3,
        "token_mask": torch.ones(2, 2, dtype=torch.bool),
    }
    assert_close(loss_of(outputs), (torch.tensor([2.0, 1.0]).logsumexp(0) - 2.0))


def test_alone_by_default_and_with_clip_by_its_weight():
    outputs = random_outputs()
    alone = FilipLoss(token_dropping=0)(**outputs, output_dict=True)
    both = FilipLoss(global_weight=0.5, token_dropping=0)(**outputs, output_dict=True)
    assert alone["contrastive_loss"] == 0
    assert both["contrastive_loss"] > 0
    assert_close(both["fine_grained_loss"], alone["fine_grained_loss"])


# Token dropping


@given(st.integers(1, 12), st.sampled_from([0.2, 0.5, 0.9]), st.integers(0, 2**32 - 1))
def test_the_share_of_each_row_is_dropped_rounded_down_and_only_from_what_counts(length, share, seed):
    torch.manual_seed(seed)
    mask = torch.rand(5, length) < 0.7
    kept = with_dropped(mask, share)
    assert (kept <= mask).all()
    for before, after in zip(mask.sum(dim=1).tolist(), kept.sum(dim=1).tolist(), strict=True):
        assert after == before - int(share * before)


def test_every_position_is_dropped_as_often_as_any_other():
    mask = torch.tensor([True] * 10 + [False] * 3)
    kept = sum(with_dropped(mask.expand(2000, -1), 0.2).sum(dim=0) for _ in range(5))
    assert_close(kept[:10] / 10000, torch.full((10,), 0.8), rtol=0, atol=0.03)
    assert (kept[10:] == 0).all()


def test_training_drops_patches_and_tokens_by_the_default_generator():
    outputs = random_outputs(batch=4, patches=10, length=10)
    loss = FilipLoss()
    torch.manual_seed(1)
    first = loss(**outputs)
    assert not torch.equal(loss(**outputs), first)
    torch.manual_seed(1)
    assert torch.equal(loss(**outputs), first)
    torch.manual_seed(1)
    patch_mask = with_dropped(torch.ones(4, 10, dtype=torch.bool), 0.2)
    token_mask = with_dropped(outputs["token_mask"], 0.2)
    masked = {**outputs, "patch_mask": patch_mask, "token_mask": token_mask}
    assert_close(first, loss_of(masked), rtol=1e-12, atol=1e-12)


def test_evaluation_drops_nothing():
    outputs = random_outputs(batch=4, patches=10, length=10)
    assert torch.equal(FilipLoss().eval()(**outputs), loss_of(outputs))


@pytest.mark.parametrize(
    ("token_dropping", "error", "message"),
    [
        (1, ValueError, "token_dropping is 1; expected a number below 1"),
        (-0.1, ValueError, "token_dropping is -0.1; expected a number between 0 and 1"),
        ("0.2", TypeError, "token_dropping is '0.2' (str); expected a number"),
    ],
)
def test_a_bad_token_dropping_is_refused(token_dropping, error, message):
    with pytest.raises(error, match=re.escape(message)):
        FilipLoss(token_dropping=token_dropping)
