"""Property tests for fine-grained objectives of your own, by hypothesis (pip install hypothesis).

Every objective of patches and tokens should have a few properties, whatever its formula: padding changes nothing,
order does not matter, masked values have no gradient. Most mistakes in such losses break one of them. To test yours:

    @pytest.mark.parametrize("invariant", INVARIANTS, ids=lambda invariant: invariant.__name__)
    @given(batch=local_batches())
    def test_my_objective(invariant, batch):
        invariant(my_objective, batch)

`my_objective(patch_features=, token_features=, token_mask=)` returns a scalar. If it takes `patch_mask` or
`region_mask`, request them: `local_batches(patch_mask=True, region_mask=True)`. An invariant raises AssertionError.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

Objective = Callable[..., Tensor]


@dataclass(frozen=True)
class LocalBatch:
    """The local features of a batch, as a surfaced model returns them.

    Attributes:
        patch_features: [B, P, D].
        token_features: [B, L, D].
        token_mask: bool [B, L], True for valid tokens.
        patch_mask: bool [B, P] or None, False for padding patches.
        region_mask: bool [B, L, P] or None, True for the patches a token may use.
    """

    patch_features: Tensor
    token_features: Tensor
    token_mask: Tensor
    patch_mask: Tensor | None = None
    region_mask: Tensor | None = None

    def but(self, **changes: Any) -> "LocalBatch":
        """A copy with some attributes changed."""
        return replace(self, **changes)

    def arguments(self) -> dict[str, Tensor]:
        """The keyword arguments for an objective: every attribute that is not None."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def with_gradients(self) -> "LocalBatch":
        """A copy whose features are leaves that require gradients."""
        return self.but(
            patch_features=self.patch_features.detach().clone().requires_grad_(),
            token_features=self.token_features.detach().clone().requires_grad_(),
        )


@st.composite
def local_batches(
    draw: st.DrawFn,
    *,
    patch_mask: bool = False,
    region_mask: bool = False,
    max_size: int = 9,
    dtype: torch.dtype = torch.float64,
) -> LocalBatch:
    """Batches with B, P, L and D from 1 to `max_size`, masks with holes and captions without a token.

    Half of the batches have whole numbers as features, which make equal similarities, zero vectors and values exactly
    at a threshold common. Whole patches are not negative, so that no sum of patches is zero up to rounding, whose
    cosine would be arbitrary. With `patch_mask` or `region_mask`, half of the batches have one.
    """
    b, p, length, d = (draw(st.integers(1, max_size)) for _ in range(4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    whole = draw(st.booleans())

    def features(*shape: int, lowest: int) -> Tensor:
        if whole:
            return torch.randint(lowest, 3, shape, generator=generator).to(dtype)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def mask(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) < draw(st.sampled_from([0.5, 0.8, 1.0]))

    batch = LocalBatch(
        patch_features=features(b, p, d, lowest=0),
        token_features=features(b, length, d, lowest=-2),
        token_mask=mask(b, length),
        patch_mask=mask(b, p) if patch_mask and draw(st.booleans()) else None,
        region_mask=mask(b, length, p) if region_mask and draw(st.booleans()) else None,
    )
    if draw(st.integers(0, 2)) == 0:
        batch.token_mask[0] = False
    return batch


def padding_captions_changes_nothing(objective: Objective, batch: LocalBatch) -> None:
    """Masked tokens, whatever their values, do not change the loss."""
    b, _, d = batch.token_features.shape
    noise = 5 * _noise(batch.token_features, b, 2, d)
    padded = batch.but(
        token_features=torch.cat([batch.token_features, noise], dim=1),
        token_mask=torch.cat([batch.token_mask, torch.zeros(b, 2, dtype=torch.bool)], dim=1),
    )
    if batch.region_mask is not None:
        anything = torch.arange(2 * b * batch.patch_features.shape[1]).reshape(b, 2, -1) % 2 == 0
        padded = padded.but(region_mask=torch.cat([batch.region_mask, anything], dim=1))
    _same(objective, padded, batch)


def padding_patches_changes_nothing(objective: Objective, batch: LocalBatch) -> None:
    """Masked patches, whatever their values, do not change the loss. For batches with a patch_mask."""
    if batch.patch_mask is None:
        return
    b, _, d = batch.patch_features.shape
    noise = 50 * _noise(batch.patch_features, b, 2, d)
    padded = batch.but(
        patch_features=torch.cat([batch.patch_features, noise], dim=1),
        patch_mask=torch.cat([batch.patch_mask, torch.zeros(b, 2, dtype=torch.bool)], dim=1),
    )
    if batch.region_mask is not None:
        anything = torch.ones(*batch.token_mask.shape, 2, dtype=torch.bool)
        padded = padded.but(region_mask=torch.cat([batch.region_mask, anything], dim=2))
    _same(objective, padded, batch)


def the_order_of_pairs_does_not_matter(objective: Objective, batch: LocalBatch) -> None:
    """Permuting the batch does not change the loss."""
    order = _order(len(batch.token_mask))
    _same(objective, batch.but(**{name: value[order] for name, value in batch.arguments().items()}), batch)


def the_order_of_patches_does_not_matter(objective: Objective, batch: LocalBatch) -> None:
    """Permuting the patches of every image does not change the loss."""
    order = _order(batch.patch_features.shape[1])
    permuted = batch.but(
        patch_features=batch.patch_features[:, order],
        patch_mask=None if batch.patch_mask is None else batch.patch_mask[:, order],
        region_mask=None if batch.region_mask is None else batch.region_mask[..., order],
    )
    _same(objective, permuted, batch)


def the_order_of_tokens_does_not_matter(objective: Objective, batch: LocalBatch) -> None:
    """Permuting the tokens of every caption does not change the loss: their order is in the embeddings."""
    order = _order(batch.token_mask.shape[1])
    permuted = batch.but(
        token_features=batch.token_features[:, order],
        token_mask=batch.token_mask[:, order],
        region_mask=None if batch.region_mask is None else batch.region_mask[:, order],
    )
    _same(objective, permuted, batch)


def masks_of_all_true_change_nothing(objective: Objective, batch: LocalBatch) -> None:
    """A mask that is True everywhere gives the same loss as no mask. For the masks that the batch has."""
    without = batch.but(patch_mask=None, region_mask=None)
    with_all = batch.but(
        patch_mask=None if batch.patch_mask is None else torch.ones_like(batch.patch_mask),
        region_mask=None if batch.region_mask is None else torch.ones_like(batch.region_mask),
    )
    _same(objective, with_all, without)


def what_is_masked_has_no_gradient(objective: Objective, batch: LocalBatch) -> None:
    """Masked tokens and patches have a gradient of exactly zero."""
    batch = batch.with_gradients()
    objective(**batch.arguments()).backward()
    assert (_gradient(batch.token_features)[~batch.token_mask] == 0).all(), "a masked token has a gradient"
    left_out = ~_patch_mask(batch)
    if batch.region_mask is not None:
        left_out = left_out | ~(batch.region_mask & batch.token_mask[..., None]).any(dim=1)
    assert (_gradient(batch.patch_features)[left_out] == 0).all(), "a patch that no token may use has a gradient"


def loss_and_gradients_are_finite(objective: Objective, batch: LocalBatch) -> None:
    """Finite input gives a finite loss and gradient, also for equal patches, zero vectors and empty captions."""
    variants = {
        "as drawn": batch,
        "equal patches": batch.but(patch_features=torch.ones_like(batch.patch_features)),
        "zero patches": batch.but(patch_features=torch.zeros_like(batch.patch_features)),
        "zero tokens": batch.but(token_features=torch.zeros_like(batch.token_features)),
        "no token": batch.but(token_mask=torch.zeros_like(batch.token_mask)),
    }
    for name, variant in variants.items():
        variant = variant.with_gradients()
        loss = objective(**variant.arguments())
        assert loss.isfinite(), f"{name}: the loss is {loss.item()}"
        loss.backward()
        for features in ("patch_features", "token_features"):
            gradient = getattr(variant, features).grad
            assert gradient is not None, f"{name}: the loss is not attached to {features}"
            assert gradient.isfinite().all(), f"{name}: the gradient of {features} is not finite"


def nan_is_never_hidden(objective: Objective, batch: LocalBatch) -> None:
    """NaN in a valid token, or in the image of one, makes the loss NaN. For captions of two tokens or more."""
    if batch.patch_mask is not None or batch.region_mask is not None or batch.token_mask.shape[1] < 2:
        return  # NaN may be masked; the contrast of a single token is zero
    batch = batch.but(token_mask=torch.ones_like(batch.token_mask))
    for features in ("patch_features", "token_features"):
        broken = getattr(batch, features).clone()
        broken[0, 0, 0] = torch.nan
        assert objective(**batch.but(**{features: broken}).arguments()).isnan(), f"NaN in {features} is hidden"


INVARIANTS: Sequence[Callable[[Objective, LocalBatch], None]] = (
    padding_captions_changes_nothing,
    padding_patches_changes_nothing,
    the_order_of_pairs_does_not_matter,
    the_order_of_patches_does_not_matter,
    the_order_of_tokens_does_not_matter,
    masks_of_all_true_change_nothing,
    what_is_masked_has_no_gradient,
    loss_and_gradients_are_finite,
    nan_is_never_hidden,
)


def _same(objective: Objective, changed: LocalBatch, batch: LocalBatch) -> None:
    tolerance = 1e-9 if batch.patch_features.dtype == torch.float64 else 1e-4
    assert_close(objective(**changed.arguments()), objective(**batch.arguments()), rtol=tolerance, atol=tolerance)


def _gradient(features: Tensor) -> Tensor:
    assert features.grad is not None, "the loss is not attached to the features"
    return features.grad


def _patch_mask(batch: LocalBatch) -> Tensor:
    return (
        torch.ones(batch.patch_features.shape[:2], dtype=torch.bool) if batch.patch_mask is None else batch.patch_mask
    )


def _order(size: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(size))


def _noise(like: Tensor, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like.dtype)
