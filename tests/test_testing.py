"""`sparc_loss.testing` lets right objectives through and stops the mistakes that such losses are known for."""

import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis.errors import NoSuchExample
from torch import Tensor

from sparc_loss.functional import fine_grained_loss
from sparc_loss.testing import INVARIANTS, LocalBatch, local_batches

EVERY_INVARIANT = {invariant.__name__: invariant for invariant in INVARIANTS}


def nearest_patch(patch_features: Tensor, token_features: Tensor, token_mask: Tensor) -> Tensor:
    """A right objective of its own: each token's largest inner product with a patch, in the mean."""
    best = (token_features @ patch_features.mT).amax(dim=-1)
    return -best.where(token_mask, 0).sum() / token_mask.sum().clamp(min=1)


@pytest.mark.parametrize("invariant", INVARIANTS, ids=lambda invariant: invariant.__name__)
@given(batch=local_batches())
def test_a_right_objective_holds(invariant: Callable, batch: LocalBatch) -> None:
    invariant(nearest_patch, batch)


def _mask_times_nan(patch_features: Tensor, token_features: Tensor, token_mask: Tensor) -> Tensor:
    similarity = (token_features @ patch_features.mT).masked_fill(~token_mask[..., None], -torch.inf)
    return (similarity.softmax(dim=-1).amax(dim=-1) * token_mask).sum() / token_mask.sum()


MISTAKES: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "the mask is forgotten": (
        "padding_captions_changes_nothing",
        lambda patch_features, token_features, token_mask: (token_features @ patch_features.mT).amax(dim=-1).mean(),
    ),
    "masked rows of -inf times zero": ("loss_and_gradients_are_finite", _mask_times_nan),
    "patches of all images are summed": (
        "the_order_of_pairs_does_not_matter",
        lambda patch_features, token_features, token_mask: (
            (token_features[0] @ patch_features.sum(dim=0).mT).amax(dim=-1) * token_mask[0]
        ).sum(),
    ),
    "softmax over tokens": (
        "padding_captions_changes_nothing",
        lambda patch_features, token_features, token_mask: (
            (token_features @ patch_features.mT).softmax(dim=1).amax(dim=-1) * token_mask
        ).sum(),
    ),
    "the place of a patch counts": (
        "the_order_of_patches_does_not_matter",
        lambda patch_features, token_features, token_mask: (
            (token_features @ patch_features.mT)[..., 0] * token_mask
        ).sum(),
    ),
    "the place of a token counts": (
        "the_order_of_tokens_does_not_matter",
        lambda patch_features, token_features, token_mask: (
            (token_features.sum(dim=-1) * token_mask * torch.arange(token_mask.shape[1])).sum()
            + 0 * patch_features.sum()
        ),
    ),
    "a masked token pulls": (
        "what_is_masked_has_no_gradient",
        lambda patch_features, token_features, token_mask: (token_features @ patch_features.mT).sum(),
    ),
    "NaN is swept away": (
        "nan_is_never_hidden",
        lambda patch_features, token_features, token_mask: nearest_patch(
            patch_features, token_features, token_mask
        ).nan_to_num(),
    ),
    "padding patches are taken for patches": (
        "padding_patches_changes_nothing",
        lambda patch_features, token_features, token_mask, patch_mask=None: nearest_patch(
            patch_features, token_features, token_mask
        ),
    ),
    "a mask of all True changes the loss": (
        "masks_of_all_true_change_nothing",
        lambda patch_features, token_features, token_mask, patch_mask=None: (
            fine_grained_loss(patch_features, token_features, token_mask, 1.0) * (1 if patch_mask is None else 2)
        ),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str) -> None:
    name, objective = MISTAKES[mistake]

    def breaks(batch: LocalBatch) -> bool:
        try:
            EVERY_INVARIANT[name](objective, batch)
        except AssertionError:
            return True
        return False

    masks = local_batches(patch_mask=name in ("padding_patches_changes_nothing", "masks_of_all_true_change_nothing"))
    quick = settings(max_examples=200, phases=[Phase.generate], suppress_health_check=list(HealthCheck), database=None)
    try:
        find(masks, breaks, settings=quick)
    except NoSuchExample:
        pytest.fail(f"{name} did not find it")


@pytest.mark.parametrize(
    ("objective", "invariant", "message"),
    [
        (
            lambda **batch: batch["patch_features"].sum() * torch.nan,
            "loss_and_gradients_are_finite",
            "the loss is nan",
        ),
        (
            lambda **batch: batch["patch_features"].sum(),
            "loss_and_gradients_are_finite",
            "as drawn: the loss is not attached to token_features",
        ),
        (
            lambda **batch: torch.zeros(()) * batch["patch_features"].detach().nan_to_num().sum(),
            "nan_is_never_hidden",
            "NaN in patch_features is hidden",
        ),
    ],
    ids=["nan", "detached", "hidden"],
)
def test_what_is_broken_is_named(objective: Callable[..., Tensor], invariant: str, message: str) -> None:
    batch = LocalBatch(torch.ones(1, 2, 3), torch.ones(1, 2, 3), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(AssertionError, match=re.escape(message)):
        EVERY_INVARIANT[invariant](objective, batch)
