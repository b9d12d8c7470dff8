"""The contrast of every caption's alignment with its own image against those with other images of the batch."""

import math
import re

import numpy as np
import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import Batch, batches
from torch import Tensor
from torch.testing import assert_close

from sparc_loss.functional import image_contrastive_loss

B, P, L, D = 4, 5, 3, 6


def features(batch: int = B, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(batch, P, D, generator=generator, dtype=torch.float64).to(dtype)
    tokens = torch.randn(batch, L, D, generator=generator, dtype=torch.float64).to(dtype)
    return patches.requires_grad_(), tokens.requires_grad_(), torch.ones(batch, L, dtype=torch.bool)


def loss_of(batch: Batch, image_negatives: int, **changed: object) -> Tensor:
    arguments = {name: value for name, value in vars(batch).items() if name != "reduction"}
    return image_contrastive_loss(**arguments | changed, image_negatives=image_negatives)


@st.composite
def batches_with_negatives(draw: st.DrawFn, **options: object) -> tuple[Batch, int]:
    batch = draw(batches(**options))
    assume(len(batch.patch_features) > 1)
    return batch, draw(st.integers(1, len(batch.patch_features) - 1))


# The value


def test_of_two_images_the_one_that_shows_the_caption_wins_by_hand() -> None:
    """Each caption's token is the direction of its own image's patches and at right angles to the other's."""
    eye = torch.eye(2).unsqueeze(1)
    loss = image_contrastive_loss(eye, eye, torch.ones(2, 1, dtype=torch.bool), 3.0, 1)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-3.0)))


@given(batches_with_negatives())
@settings(max_examples=80)
def test_equals_the_slow_reference(drawn: tuple[Batch, int]) -> None:
    batch, negatives = drawn
    arguments = {name: value.numpy() if isinstance(value, Tensor) else value for name, value in vars(batch).items()}
    del arguments["reduction"]
    expected = reference.image_contrastive(**arguments, image_negatives=negatives)
    np.testing.assert_allclose(loss_of(batch, negatives).item(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("alignment", ["sparse", "dense", "softmax"])
def test_first_and_second_derivatives(alignment: str) -> None:
    patches, tokens, mask = (each[:3, :2].detach() for each in features())
    patches, tokens = (each[..., :3].clone().requires_grad_() for each in (patches, tokens))
    mask[0, 1] = mask[2] = False
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def loss(patches: Tensor, tokens: Tensor, scale: Tensor) -> Tensor:
        return image_contrastive_loss(patches, tokens, mask, scale, 2, alignment=alignment)

    assert torch.autograd.gradcheck(loss, (patches, tokens, scale))
    assert torch.autograd.gradgradcheck(loss, (patches, tokens, scale))


def test_images_that_are_all_alike_cannot_be_told_apart() -> None:
    patches, tokens, mask = features()
    alike = patches[:1].expand(B, P, D)
    assert image_contrastive_loss(alike, tokens, mask, 50.0, 3).item() == pytest.approx(math.log(4))


def test_swapping_the_patches_of_two_images_swaps_their_scores() -> None:
    """With one negative of two images, the margin between the scores changes its sign."""
    patches, tokens, mask = features(batch=2)
    mask[1] = False  # one caption, so that the loss is softplus(-margin)
    loss = image_contrastive_loss(patches, tokens, mask, 4.0, 1)
    swapped = image_contrastive_loss(patches.flip(0), tokens, mask, 4.0, 1)
    margin = -loss.expm1().log()
    assert_close(swapped, torch.nn.functional.softplus(margin))
    assert abs(margin) > 0.01


@given(batches_with_negatives())
@settings(max_examples=25)
def test_rolling_the_whole_batch_changes_nothing(drawn: tuple[Batch, int]) -> None:
    batch, negatives = drawn
    rolled = {name: value.roll(1, dims=0) for name, value in vars(batch).items() if isinstance(value, Tensor)}
    assert_close(loss_of(batch, negatives, **rolled), loss_of(batch, negatives), rtol=1e-9, atol=1e-9)


def test_with_all_others_as_negatives_the_order_of_the_pairs_does_not_matter() -> None:
    patches, tokens, mask = features()
    order = torch.tensor([2, 0, 3, 1])
    mask[1, 2] = False
    loss = image_contrastive_loss(patches, tokens, mask, 4.0, B - 1)
    assert_close(image_contrastive_loss(patches[order], tokens[order], mask[order], 4.0, B - 1), loss)


# Masks and degenerate input


@given(batches_with_negatives(), st.integers(1, 3))
@settings(max_examples=25)
def test_padding_changes_nothing(drawn: tuple[Batch, int], extra: int) -> None:
    batch, negatives = drawn
    size, patches, dim = batch.patch_features.shape
    length = batch.token_features.shape[1]
    mask = torch.ones(size, patches, dtype=torch.bool) if batch.patch_mask is None else batch.patch_mask
    region = torch.ones(size, length, patches, dtype=torch.bool) if batch.region_mask is None else batch.region_mask
    more = torch.full((size, extra, dim), 7.0, dtype=torch.float64)
    none = torch.zeros(size, extra, dtype=torch.bool)
    padded = loss_of(
        batch,
        negatives,
        patch_features=torch.cat([batch.patch_features, more], dim=1),
        token_features=torch.cat([batch.token_features, more], dim=1),
        token_mask=torch.cat([batch.token_mask, none], dim=1),
        patch_mask=torch.cat([mask, none], dim=1),
        region_mask=torch.nn.functional.pad(region, (0, extra, 0, extra), value=True),
    )
    assert_close(padded, loss_of(batch, negatives, patch_mask=mask, region_mask=region), rtol=1e-9, atol=1e-9)


def test_a_caption_without_a_token_counts_for_nothing_but_its_image_is_a_negative() -> None:
    patches, tokens, mask = features()
    mask[1] = False
    loss = image_contrastive_loss(patches, tokens, mask, 4.0, 1)
    loss.backward()
    assert not tokens.grad[1].any()
    assert patches.grad[1].any()


def test_an_image_without_a_patch_is_nobodys_negative() -> None:
    patches, tokens, mask = features()
    patch_mask = torch.ones(B, P, dtype=torch.bool)
    patch_mask[1] = False
    loss = image_contrastive_loss(patches, tokens, mask, 4.0, 1, patch_mask=patch_mask)
    loss.backward()
    assert not patches.grad[1].any()
    assert all(tensor.grad.isfinite().all() for tensor in (patches, tokens))
    assert not tokens.grad[0].any()  # its own image is the only one: nothing to mistake
    assert not tokens.grad[1].any()  # without an image the caption does not count
    assert tokens.grad[2].any()


def test_regions_bind_on_the_own_image_only() -> None:
    patches, tokens, mask = features(batch=2)
    none = torch.zeros(2, L, P, dtype=torch.bool)
    none[:, 0] = True  # the first token may use all of its image, the others nothing
    loss = image_contrastive_loss(patches, tokens, mask, 4.0, 1, region_mask=none)
    assert_close(loss, image_contrastive_loss(patches, tokens[:, :1], mask[:, :1], 4.0, 1))


@pytest.mark.parametrize("zero", ["patches", "tokens", "both"])
def test_zero_features_give_a_finite_gradient(zero: str) -> None:
    patches, tokens, mask = features()
    patches, tokens = patches.detach(), tokens.detach()
    if zero != "tokens":
        patches[1] = 0
    if zero != "patches":
        tokens[2, 1] = 0
    patches.requires_grad_(), tokens.requires_grad_()
    loss = image_contrastive_loss(patches, tokens, mask, 10.0, 2)
    loss.backward()
    assert all(each.isfinite().all() for each in (loss, patches.grad, tokens.grad))


def test_a_batch_without_a_token_is_zero_and_attached() -> None:
    patches, tokens, mask = features()
    loss = image_contrastive_loss(patches, tokens, mask & False, 10.0, 2)
    loss.backward()
    assert loss.item() == 0
    assert not patches.grad.any()
    assert not tokens.grad.any()


def test_nan_in_another_image_shows() -> None:
    patches, tokens, mask = features()
    patches = patches.detach().clone()
    patches[3, 0, 0] = math.nan
    assert image_contrastive_loss(patches, tokens, mask, 1.0, 1).isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    patches, tokens, mask = features(dtype=dtype)
    loss = image_contrastive_loss(patches, tokens, mask, 10.0, 2)
    assert loss.dtype == torch.float32
    assert_close(loss, image_contrastive_loss(patches.float(), tokens.float(), mask, 10.0, 2), rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(image_contrastive_loss(patches, tokens, mask, 10.0, 2), loss, rtol=0, atol=0)


# Bad input


@pytest.mark.parametrize(
    ("image_negatives", "error", "message"),
    [
        (4, ValueError, "image_negatives is 4 with 4 images in this process's batch; expected at most 3"),
        (0, ValueError, "image_negatives is 0; expected at least 1 (0 in SparcLoss turns it off)"),
        (-1, ValueError, "image_negatives is -1; expected at least 1"),
        (1.0, TypeError, "image_negatives is 1.0 (float); expected an int"),
        (True, TypeError, "image_negatives is True (bool); expected an int"),
    ],
)
def test_a_number_that_the_batch_has_not_is_refused(image_negatives, error, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        image_contrastive_loss(*features(), 1.0, image_negatives)


def test_a_single_image_has_no_negatives_and_says_so() -> None:
    with pytest.raises(ValueError, match=r"with 1 images .*; expected at most 0: an image has no negatives but"):
        image_contrastive_loss(*features(batch=1), 1.0, 1)
