"""The fused contrast with other images alone: it costs 1 + K alignments, or a product an image."""

from contextlib import AbstractContextManager, nullcontext
from unittest import mock

import pytest
import torch
from fused_terms import assert_same, flops, loss_and_gradients, random_batch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import Batch, batches
from torch import Tensor
from torch.testing import assert_close

from sparc_loss import functional, fused
from sparc_loss.functional import DIRECTIONS, REDUCTIONS
from sparc_loss.fused import groups, highest_patch, highest_patch_by_image, image_contrast
from sparc_loss.fused.groups import caption_slices

TERM = "image_contrastive_loss"


# What it costs


@pytest.mark.parametrize("negatives", [1, 3])
def test_multiplications_are_those_of_one_plus_k_alignments_of_valid_tokens(negatives: int) -> None:
    n, p, d = [3, 1, 0, 17, 4, 17], 23, 19
    batch = random_batch(n, p, 20, d)
    value, gradient = ((1 + negatives) * each * sum(n) * p * d for each in (4, 8))
    # One caption at a time: nothing is padded.
    options = {"image_negatives": negatives, "chunk_bytes": 1}
    assert flops(TERM, batch, **options) == value + gradient
    assert flops(TERM, batch, **options, recompute=True) == 2 * value + gradient
    assert flops(TERM, batch, image_negatives=negatives) <= 1.1 * (value + gradient)
    with torch.no_grad():
        assert flops(TERM, batch, **options) == value


@pytest.mark.parametrize("images", [1, 2, 8])
def test_what_waits_for_further_images_counts_in_the_workspace(images: int) -> None:
    patches, dim, length, chunk_bytes = 49, 16, 10, 2**19
    at_once = 2 * patches * dim + length * (12 * dim + 6 * patches)
    waiting = (images - 1) * length * 2 * (patches + dim)
    for group, _ in caption_slices([length] * 60, (60, patches, dim), 4, chunk_bytes, 0.5, images):
        assert 1 < group.stop - group.start <= chunk_bytes / (4 * (at_once + waiting))


# The highest patch alone


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("padding", [0.1, 10.0])
@pytest.mark.parametrize("masks", [False, True])
def test_the_highest_patch_alone_is_gathered_and_not_multiplied(padding: float, masks: bool, direction: str) -> None:
    batch = random_batch([4, 2, 0, 3], 6, 4, 5).but(threshold=1.0)
    if masks:
        batch = batch.but(region_mask=torch.rand(4, 4, 6) < 0.8, patch_mask=torch.rand(4, 6) < 0.8)
    options = {"image_negatives": 2, "direction": direction}
    multiplied = mock.patch.object(image_contrast, "weights_and_gradient", side_effect=AssertionError("multiplied"))
    with mock.patch.object(groups, "CPU_PADDING", padding), multiplied:
        found = loss_and_gradients(fused, TERM, batch, 0.5, **options)
    assert_same(found, loss_and_gradients(functional, TERM, batch, 0.5, **options), 1e-10)


@pytest.mark.parametrize("asked", [True, False])
def test_patches_that_are_equally_high_share_the_weight(asked: bool) -> None:
    batch = random_batch([4, 2, 3], 6, 4, 5).but(threshold=1.0)
    batch.patch_features[1, 3] = batch.patch_features[1, 0] = 9 * batch.token_features[1, 0]
    expected = loss_and_gradients(functional, TERM, batch, direction="both")
    with nullcontext() if asked else as_on_a_device():
        assert_same(loss_and_gradients(fused, TERM, batch, direction="both"), expected, 1e-10)


def as_on_a_device() -> AbstractContextManager:
    """A threshold of 1 is computed as where asking the device whether patches tie would wait."""
    by_image = highest_patch_by_image.highest_patch_loss_and_gradients
    return mock.patch.object(highest_patch, "highest_patch_loss_and_gradients", by_image)


def test_the_highest_patch_alone_costs_one_product_an_image() -> None:
    batch = random_batch([5] * 8, 20, 5, 16, torch.float32)
    product = 2 * 4 * 8 * 5 * 20 * 16  # of 4 images, 8 captions, 5 tokens, 20 patches, 16 dimensions

    def products(threshold: float, **options: object) -> float:
        return flops(TERM, batch.but(threshold=threshold), image_negatives=3, **options) / product

    assert [products(threshold) for threshold in (1.0, 0.5)] == [1, 6]
    # All scores come before any gradient: which patch was the highest is remembered, weights are computed again.
    assert [products(threshold, direction="both") for threshold in (1.0, 0.5)] == [1, 8]
    with as_on_a_device():
        assert products(1.0, direction="both") == 4


@given(
    batches(),
    st.integers(1, 8),
    st.sampled_from(DIRECTIONS),
    st.sampled_from(REDUCTIONS),
    st.sampled_from([1, 2**11, 2**30]),
    st.sampled_from([1.0, 0.3]),
)
def test_without_asking_whether_patches_tie_value_and_gradient_are_the_same(
    batch: Batch, negatives: int, direction: str, reduction: str, chunk_bytes: int, weight: float
) -> None:
    batch = batch.but(threshold=1.0, alignment="sparse", reduction=reduction)
    assume(not _different_patches_tie(batch))
    options = {"image_negatives": negatives, "direction": direction}
    expected = loss_and_gradients(functional, TERM, batch, weight, **options)
    with as_on_a_device():
        found = loss_and_gradients(fused, TERM, batch, weight, **options, chunk_bytes=chunk_bytes)
    assert_same(found, expected, 1e-9)


def _different_patches_tie(batch: Batch) -> bool:
    """Whether a token has two highest patches that differ: there the loss has a step."""
    similarity = torch.einsum("ild,jpd->iljp", batch.token_features, batch.patch_features)
    ends = similarity.aminmax(dim=-1, keepdim=True)
    return ((similarity > ends.max - 1e-9 * (1 + ends.max - ends.min)).sum(dim=-1) > 1).any().item()


def test_a_compiled_caller_breaks_its_graph_and_goes_on() -> None:
    torch.compiler.reset()
    batch = random_batch([4, 2, 3], 6, 4, 5)

    def doubled(patch_features: Tensor) -> Tensor:
        changed = batch.but(patch_features=patch_features)
        return 2 * fused.image_contrastive_loss(**vars(changed), image_negatives=2)

    compiled = torch.compile(doubled, backend="eager")
    assert_close(compiled(batch.patch_features), doubled(batch.patch_features))


@pytest.mark.parametrize("threshold", [None, 1.0])
def test_nan_in_a_masked_patch_reaches_no_gradient_where_an_image_has_no_patch(threshold):
    generator = torch.Generator().manual_seed(0)
    patches, tokens = torch.randn(4, 5, 6, generator=generator), torch.randn(4, 3, 6, generator=generator)
    scale, token_mask = torch.tensor(10.0), torch.ones(4, 3, dtype=torch.bool)
    patch_mask = torch.ones(4, 5, dtype=torch.bool)
    patch_mask[0, 0], patch_mask[2] = False, False
    patches[0, 0] = torch.nan
    gradients = []
    for module in (fused, functional):
        inputs = [each.clone().requires_grad_() for each in (patches, tokens, scale)]
        loss = module.image_contrastive_loss(
            *inputs[:2], token_mask, inputs[2], 2, threshold=threshold, patch_mask=patch_mask
        )
        gradients.append(torch.autograd.grad(loss, inputs))
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
