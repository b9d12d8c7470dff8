"""Blocks of pairs, whatever their size, are the whole."""

from unittest import mock

import pytest
import torch
from baseline_outputs import random_outputs
from torch.testing import assert_close

from sparc_loss.losses import FilipLoss, GloriaLoss, PaclLoss, all_pairs

LOSSES = [FilipLoss, GloriaLoss, PaclLoss]
FEATURES = ("patch_features", "token_features", "text_features", "logit_scale")


def value_and_gradients(loss_class, outputs):
    loss = loss_class().eval()(**outputs)
    return [loss, *torch.autograd.grad(loss, [outputs[name] for name in FEATURES], materialize_grads=True)]


@pytest.mark.parametrize("numbers", [1, 70, 200], ids=lambda numbers: f"{numbers} numbers")
@pytest.mark.parametrize("loss_class", LOSSES)
def test_many_blocks_give_the_value_and_gradient_of_one(loss_class, numbers):
    outputs = random_outputs(batch=7)
    outputs["token_mask"] = torch.rand(7, 5) < 0.5
    outputs["patch_mask"] = torch.rand(7, 4) < 0.7
    expected = value_and_gradients(loss_class, outputs)
    with mock.patch.object(all_pairs, "BLOCK_NUMBERS", numbers):
        assert_close(value_and_gradients(loss_class, outputs), expected, rtol=1e-12, atol=1e-12)


def test_no_block_is_larger_than_its_limit():
    sizes = []

    def score(patches, patch_mask, tokens, token_mask):
        sizes.append(len(patches) * len(tokens) * tokens.shape[1] * max(patches.shape[1:]))
        return patches.new_zeros(2, len(patches), len(tokens))

    outputs = random_outputs(batch=16, patches=3, length=5, dim=2)
    with mock.patch.object(all_pairs, "BLOCK_NUMBERS", 100):
        scores = all_pairs.all_pairs_scores(
            score,
            outputs["patch_features"],
            torch.ones(16, 3, dtype=torch.bool),
            outputs["token_features"],
            outputs["token_mask"],
        )
    assert scores.shape == (2, 16, 16)
    assert max(sizes) <= 100
    assert sum(sizes) < 16 * 16 * 5 * 3  # short captions are not padded to the longest


def kept_for_backward(loss_class, outputs, numbers):
    """Bytes that the loss keeps for its backward pass, each storage once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        mock.patch.object(all_pairs, "BLOCK_NUMBERS", numbers),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        _loss = loss_class().eval()(**outputs)  # alive, so that no storage is used twice
        return sum(storages.values())


@pytest.mark.parametrize("loss_class", LOSSES)
def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_pairs_but_with_the_features(loss_class):
    outputs = random_outputs(batch=32, patches=16, length=12, dim=8, dtype=torch.float32)
    outputs["token_mask"] = torch.ones(32, 12, dtype=torch.bool)
    features = outputs["patch_features"].nbytes + outputs["token_features"].nbytes
    whole = kept_for_backward(loss_class, outputs, 2**24)
    in_blocks = kept_for_backward(loss_class, outputs, 2**10)
    assert in_blocks < 8 * features
    assert whole > 2 * in_blocks
