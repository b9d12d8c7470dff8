"""What must hold of the fine-grained loss for every input, in each implementation of it."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from implementations import IMPLEMENTATIONS
from strategies import Batch, batches, settings
from torch import Tensor
from torch.testing import assert_close

from sparc_loss.functional import alignment_weights, sequence_contrastive_loss
from sparc_loss.testing import INVARIANTS, LocalBatch, local_batches

close = partial(assert_close, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("invariant", INVARIANTS, ids=lambda invariant: invariant.__name__)
@given(batch=local_batches(patch_mask=True, region_mask=True), options=settings())
def test_holds_the_invariants_of_sparc_loss_testing(
    invariant: Callable[..., None], name: str, batch: LocalBatch, options: dict[str, Any]
) -> None:
    invariant(partial(IMPLEMENTATIONS[name], **options), batch)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@given(batch=batches(reduction="sample"))
def test_a_pair_does_not_see_the_others(name: str, batch: Batch) -> None:
    """The loss of a batch is the mean of its pairs' own losses, so the gradient of each is its own too."""
    size = len(batch.token_mask)
    batch = batch.with_gradients()
    together = IMPLEMENTATIONS[name](**vars(batch))
    gradients = torch.autograd.grad(together, (batch.patch_features, batch.token_features))
    alone = [IMPLEMENTATIONS[name](**vars(pair(batch, index))) for index in range(size)]
    close(together, sum(alone) / size)
    own = torch.autograd.grad(sum(alone) / size, (batch.patch_features, batch.token_features))
    close(gradients, own)


def pair(batch: Batch, index: int) -> Batch:
    """The batch of one pair alone."""
    return batch.but(
        **{name: value[[index]] for name, value in batch.arguments().items() if isinstance(value, Tensor)}
    )


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@given(batch=batches())
def test_lies_between_zero_and_its_bound(name: str, batch: Batch) -> None:
    """Cosines lie in [-1, 1]: a token's own is at worst 2 * logit_scale below each of the others."""
    loss = IMPLEMENTATIONS[name](**vars(batch))
    most = batch.token_mask.sum(dim=1).max().item()
    assert -1e-9 <= loss <= 2 * batch.logit_scale + math.log(max(most, 1)) + 1e-9


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@given(batch=batches(masks=False), length=st.integers(1, 9))
def test_reductions_agree_where_all_captions_are_equally_long(name: str, batch: Batch, length: int) -> None:
    batch = batch.but(token_mask=(torch.arange(batch.token_mask.shape[1]) < length).expand_as(batch.token_mask))
    by_token, by_sample = (
        IMPLEMENTATIONS[name](**vars(batch.but(reduction=reduction))) for reduction in ("token", "sample")
    )
    close(by_token, by_sample)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@given(batch=batches(), exponent=st.integers(-20, 20))
def test_the_scale_of_an_image_does_not_matter(name: str, batch: Batch, exponent: int) -> None:
    """Its similarities scale with it; Eq. 2 divides the scale out, and the norm of Eq. 6 takes it off c_l.

    Not so with softmax, which is sharper at a larger scale. Powers of two, exact in floating point: otherwise a
    similarity right at the threshold may fall to either side.
    """
    assume(batch.alignment != "softmax")
    scaled = batch.patch_features.clone()
    scaled[0] *= 2.0**exponent
    changed = batch.but(patch_features=scaled)
    close(changed.weights(), batch.weights())
    close(IMPLEMENTATIONS[name](**vars(changed)), IMPLEMENTATIONS[name](**vars(batch)))


@given(batch=batches(), shift=st.integers(-8, 8))
def test_a_constant_added_to_the_similarities_of_a_token_leaves_its_alignment(batch: Batch, shift: int) -> None:
    """Eq. 2 subtracts the minimum, and softmax does not see a constant. Whole numbers, exact in floating point."""
    similarity = (batch.token_features @ batch.patch_features.mT).round()
    shifted = similarity.clone()
    shifted[0, 0] += shift
    options = (batch.threshold, batch.alignment, batch.patch_mask, batch.region_mask)
    close(alignment_weights(shifted, *options), alignment_weights(similarity, *options))


@given(batch=batches(masks=False), seed=st.integers(0, 2**32 - 1))
def test_the_two_directions_of_the_contrast_are_symmetric(batch: Batch, seed: int) -> None:
    other = torch.randn(batch.token_features.shape, generator=torch.Generator().manual_seed(seed)).double()
    options = (batch.token_mask, batch.logit_scale, batch.reduction)
    one_way = sequence_contrastive_loss(other, batch.token_features, *options)
    close(sequence_contrastive_loss(batch.token_features, other, *options), one_way)
