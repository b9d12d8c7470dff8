"""The contrast of a caption's alignment with other images, in each implementation of it."""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from implementations import IMAGE_CONTRASTS
from strategies import Batch, batches, settings
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from sparc_loss.functional import (
    ALIGNMENTS,
    DIRECTIONS,
    REDUCTIONS,
    alignment_scores,
    alignment_weights,
    language_grouped_embeddings,
    token_patch_similarity,
)
from sparc_loss.testing import INVARIANTS, LocalBatch, local_batches

close = partial(assert_close, rtol=1e-9, atol=1e-9)


@st.composite
def contrasted(draw: st.DrawFn, **options: object) -> tuple[Batch, int]:
    """A batch of at least two pairs, and a number of negatives that it has."""
    batch = draw(batches(**options))
    assume(len(batch.token_mask) > 1)
    return batch, draw(st.integers(1, len(batch.token_mask) - 1))


def random_batch(lengths: list[int], dtype: torch.dtype = torch.float64) -> Batch:
    """6 patches, up to 4 tokens of 5 dimensions: caption b has lengths[b] tokens."""
    return Batch(
        patch_features=torch.randn(len(lengths), 6, 5, dtype=dtype),
        token_features=torch.randn(len(lengths), 4, 5, dtype=dtype),
        token_mask=torch.arange(4) < torch.tensor(lengths)[:, None],
        logit_scale=10.0,
    )


def arrays(batch: Batch) -> dict[str, Any]:
    """The arguments for `reference`."""
    return {name: value.numpy() if isinstance(value, Tensor) else value for name, value in vars(batch).items()}


every_implementation = pytest.mark.parametrize("loss", IMAGE_CONTRASTS.values(), ids=IMAGE_CONTRASTS)
every_direction = pytest.mark.parametrize(
    "loss",
    [partial(loss, direction=direction) for loss in IMAGE_CONTRASTS.values() for direction in DIRECTIONS],
    ids=[f"{name}, {direction}" for name in IMAGE_CONTRASTS for direction in DIRECTIONS],
)


# The value and the gradient


@every_implementation
def test_two_images_of_one_patch_by_hand(loss: Callable[..., Tensor]) -> None:
    """Each token but the last, which is zero, has cosine 1 with its own image and -1 with the other."""
    patches = torch.tensor([[[1.0, 0.0]], [[-1.0, 0.0]]], dtype=torch.float64)
    tokens = torch.tensor([[[2.0, 0.0], [1.0, 0.0]], [[-3.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])
    found = loss(patches, tokens, mask, 3.0, 1)
    assert found.item() == pytest.approx(math.log1p(math.exp(-6.0)))
    # A token of zeros has cosine 0 with both images: the scores of its caption are halved.
    found = loss(patches, tokens, torch.ones(2, 2, dtype=torch.bool), 3.0, 1)
    assert found.item() == pytest.approx((math.log1p(math.exp(-6.0)) + math.log1p(math.exp(-3.0))) / 2)


@every_direction
@given(drawn=contrasted())
@hypothesis_settings(max_examples=100)
def test_equals_the_slow_reference(loss: Callable[..., Tensor], drawn: tuple[Batch, int]) -> None:
    batch, negatives = drawn
    expected = reference.image_contrastive(**arrays(batch), image_negatives=negatives, **loss.keywords)
    close(loss(**vars(batch), image_negatives=negatives).item(), expected, rtol=1e-10, atol=1e-10)


@every_direction
@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_gradient_is_that_of_the_slow_reference(
    loss: Callable[..., Tensor], alignment: str, reduction: str
) -> None:
    batch = random_batch([3, 1, 0, 4]).but(alignment=alignment, reduction=reduction, threshold=0.3)
    batch = batch.but(region_mask=torch.rand(4, 4, 6) < 0.8, patch_mask=torch.rand(4, 6) < 0.8)
    inputs = {
        name: torch.as_tensor(getattr(batch, name), dtype=torch.float64).clone().requires_grad_()
        for name in ("patch_features", "token_features", "logit_scale")
    }
    loss(**vars(batch.but(**inputs)), image_negatives=2).backward()

    for name, value in inputs.items():
        directions = torch.randn(4, *value.shape, dtype=torch.float64)
        slopes = [slope(batch, name, direction.numpy(), loss.keywords) for direction in directions]
        expected = [(value.grad * direction).sum().item() for direction in directions]
        assert slopes == pytest.approx(expected, rel=1e-9, abs=1e-10)


def slope(batch: Batch, name: str, direction: np.ndarray, options: dict[str, Any], step: float = 1e-3) -> float:
    """Derivative of the slow reference along a direction, by differences of sixth order."""
    arguments = arrays(batch)

    def moved(by: float) -> float:
        changed = {**arguments, name: arguments[name] + by * direction}
        return reference.image_contrastive(**changed, image_negatives=2, **options)

    differences = [moved(k * step) - moved(-k * step) for k in (1, 2, 3)]
    return sum(weight * each for weight, each in zip((45, -9, 1), differences, strict=True)) / (60 * step)


def test_eager_has_second_derivatives() -> None:
    batch = random_batch([2, 1, 0])
    patch_mask = torch.ones(3, 6, dtype=torch.bool)
    patch_mask[2] = False

    def of_inputs(patch_features: Tensor, token_features: Tensor) -> Tensor:
        changed = batch.but(patch_features=patch_features, token_features=token_features, patch_mask=patch_mask)
        return IMAGE_CONTRASTS["eager"](**vars(changed), image_negatives=2)

    inputs = [tensor.clone().requires_grad_() for tensor in (batch.patch_features, batch.token_features)]
    assert torch.autograd.gradgradcheck(of_inputs, inputs, fast_mode=True)


# What must hold for every input


@every_direction
@pytest.mark.parametrize("invariant", INVARIANTS, ids=lambda invariant: invariant.__name__)
@given(batch=local_batches(patch_mask=True), options=settings())
@hypothesis_settings(max_examples=40)
def test_holds_the_invariants_with_all_other_images_as_negatives(
    loss: Callable[..., Tensor], invariant: Callable[..., None], batch: LocalBatch, options: dict[str, Any]
) -> None:
    """Without regions: patches that lie outside of them have a gradient here, from the captions of others."""
    negatives = len(batch.token_mask) - 1
    assume(negatives)
    invariant(partial(loss, image_negatives=negatives, **options), batch)


@every_direction
@given(drawn=contrasted(), steps=st.integers(1, 8))
@hypothesis_settings(max_examples=40)
def test_rolling_the_batch_changes_nothing(loss: Callable[..., Tensor], drawn: tuple[Batch, int], steps: int) -> None:
    """With fewer negatives than others the order of the pairs counts, but not where it begins."""
    batch, negatives = drawn
    rolled = {name: value.roll(steps, 0) for name, value in batch.arguments().items() if isinstance(value, Tensor)}
    close(loss(**vars(batch.but(**rolled)), image_negatives=negatives), loss(**vars(batch), image_negatives=negatives))


@every_implementation
def test_the_negatives_are_the_images_of_the_next_pairs(loss: Callable[..., Tensor]) -> None:
    batch = random_batch([0, 0, 0, 2, 0]).with_gradients()
    loss(**vars(batch), image_negatives=2).backward()
    assert [bool(gradient.any()) for gradient in batch.patch_features.grad] == [True, False, False, True, True]


@every_implementation
@given(batch=batches(masks=False), seed=st.integers(0, 2**32 - 1))
@hypothesis_settings(max_examples=40)
def test_swapping_the_patches_of_two_images_swaps_their_scores(
    loss: Callable[..., Tensor], batch: Batch, seed: int
) -> None:
    """With one caption and two images the loss is softplus(other score - own score), before and after."""
    assume(batch.token_mask.any())
    pair = torch.randint(len(batch.token_mask), (2,), generator=torch.Generator().manual_seed(seed))
    index = batch.token_mask.any(dim=1).nonzero()[0]
    mask = torch.stack([batch.token_mask[index[0]], torch.zeros_like(batch.token_mask[0])])
    tokens = batch.token_features[index].expand(2, -1, -1)
    two = batch.but(patch_features=batch.patch_features[pair], token_features=tokens, token_mask=mask)
    two = two.but(reduction="token")
    own, other = (score(two, patches) for patches in two.patch_features)
    for images, margin in ((two.patch_features, other - own), (two.patch_features.flip(0), own - other)):
        close(loss(**vars(two.but(patch_features=images)), image_negatives=1), F.softplus(two.logit_scale * margin))


def score(batch: Batch, patches: Tensor) -> Tensor:
    """The score of the first caption on an image."""
    tokens, mask, patches = batch.token_features[:1], batch.token_mask[:1], patches[None]
    weights = alignment_weights(token_patch_similarity(tokens, patches), batch.threshold, batch.alignment)
    return alignment_scores(language_grouped_embeddings(weights, patches), tokens, mask)[0]


@every_direction
@given(drawn=contrasted())
@hypothesis_settings(max_examples=40)
def test_lies_between_zero_and_its_bound(loss: Callable[..., Tensor], drawn: tuple[Batch, int]) -> None:
    """Scores lie in [-1, 1]: the own one is at worst 2 * logit_scale below each of the others."""
    batch, negatives = drawn
    found = loss(**vars(batch), image_negatives=negatives)
    assert -1e-9 <= found <= 2 * batch.logit_scale + math.log(1 + negatives) + 1e-9


@every_implementation
def test_images_that_are_all_alike_cannot_be_told_apart(loss: Callable[..., Tensor]) -> None:
    batch = random_batch([4, 1, 2, 3])
    alike = batch.but(patch_features=batch.patch_features[:1].expand(4, -1, -1))
    assert loss(**vars(alike), image_negatives=3).item() == pytest.approx(math.log(4))


# What counts


@every_implementation
def test_captions_weigh_the_same_whatever_their_length(loss: Callable[..., Tensor]) -> None:
    batch = random_batch([4, 1, 0])
    alone = [
        loss(**vars(batch.but(token_mask=batch.token_mask & torch.tensor(keep)[:, None])), image_negatives=1)
        for keep in ([True, False, False], [False, True, False])
    ]
    close(loss(**vars(batch), image_negatives=1), sum(alone) / 2)
    close(loss(**vars(batch.but(reduction="sample")), image_negatives=1), sum(alone) / 3)


@every_implementation
def test_both_directions_by_hand(loss: Callable[..., Tensor]) -> None:
    """Three captions of one token, three images of one patch, so that a score is a cosine; K = 1."""
    angles = torch.tensor([[0.0, 0.3, 1.0], [0.2, 0.5, 1.6]], dtype=torch.float64)  # of captions, of images
    tokens, patches = (torch.stack([each.cos(), each.sin()], dim=-1)[:, None] for each in angles)
    cosine = (angles[0, :, None] - angles[1]).cos().tolist()
    terms = []
    for i in range(3):
        after, before = cosine[i][(i + 1) % 3], cosine[(i - 1) % 3][i]
        terms += [math.log1p(math.exp(4 * (other - cosine[i][i]))) for other in (after, before)]
    mask = torch.ones(3, 1, dtype=torch.bool)
    found = loss(patches, tokens, mask, 4.0, 1, direction="both")
    assert found.item() == pytest.approx(sum(terms) / 6)
    assert loss(patches, tokens, mask, 4.0, 1).item() == pytest.approx(sum(terms[::2]) / 3)


@every_implementation
def test_in_both_directions_a_caption_without_a_token_is_no_negative(loss: Callable[..., Tensor]) -> None:
    batch = random_batch([3, 0, 2])
    found = loss(**vars(batch), image_negatives=2, direction="both")
    forwards = loss(**vars(batch), image_negatives=2)
    # Image 0 is told from caption 2 alone, and image 2 from caption 0.
    scores = [[score(of(batch, caption), batch.patch_features[image]) for image in (0, 2)] for caption in (0, 2)]
    backwards = (F.softplus(10 * (scores[1][0] - scores[0][0])) + F.softplus(10 * (scores[0][1] - scores[1][1]))) / 2
    close(found, (forwards + backwards) / 2)


def of(batch: Batch, caption: int) -> Batch:
    """With this caption first."""
    return batch.but(token_features=batch.token_features[caption:], token_mask=batch.token_mask[caption:])


@every_implementation
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_caption_without_a_token_adds_nothing_but_its_image_is_a_negative(
    loss: Callable[..., Tensor], reduction: str
) -> None:
    batch = random_batch([3, 0, 2]).but(reduction=reduction).with_gradients()
    loss(**vars(batch), image_negatives=1).backward()
    assert not batch.token_features.grad[1].any()
    assert batch.patch_features.grad[1].any()


@every_direction
def test_an_image_without_a_patch_is_no_negative_and_its_caption_does_not_count(loss: Callable[..., Tensor]) -> None:
    batch = random_batch([3, 2, 4])
    patch_mask = torch.ones(3, 6, dtype=torch.bool)
    patch_mask[1] = False
    masked = batch.but(patch_mask=patch_mask).with_gradients()
    found = loss(**vars(masked), image_negatives=2)
    found.backward()
    assert not masked.patch_features.grad[1].any()
    assert not masked.token_features.grad[1].any()
    others = {name: value[[0, 2]] for name, value in batch.arguments().items() if isinstance(value, Tensor)}
    close(found.detach(), loss(**vars(batch.but(**others)), image_negatives=1))


@every_direction
def test_a_caption_whose_negatives_all_lack_patches_is_told_at_no_cost(loss: Callable[..., Tensor]) -> None:
    batch = random_batch([3, 2])
    patch_mask = torch.tensor([[True] * 6, [False] * 6])
    masked = batch.but(patch_mask=patch_mask).with_gradients()
    found = loss(**vars(masked), image_negatives=1)
    found.backward()
    assert found == 0
    assert not masked.patch_features.grad.any()
    assert not masked.token_features.grad.any()


@every_implementation
def test_regions_hold_for_the_own_image_only(loss: Callable[..., Tensor]) -> None:
    batch = random_batch([2, 0])
    region_mask = torch.zeros(2, 4, 6, dtype=torch.bool)
    region_mask[0, :2, :3] = True
    found = loss(**vars(batch.but(region_mask=region_mask)), image_negatives=1)
    cut = batch.but(patch_features=batch.patch_features[:, :3], token_mask=batch.token_mask)
    margin = score(batch, batch.patch_features[1]) - score(batch, cut.patch_features[0])
    close(found, F.softplus(batch.logit_scale * margin))


@every_direction
def test_a_token_that_may_use_no_patch_of_its_own_image_does_not_count(loss: Callable[..., Tensor]) -> None:
    batch = random_batch([4, 3])
    region_mask = torch.ones(2, 4, 6, dtype=torch.bool)
    region_mask[0, 2] = False
    without = batch.token_mask.clone()
    without[0, 2] = False
    close(
        loss(**vars(batch.but(region_mask=region_mask)), image_negatives=1),
        loss(**vars(batch.but(token_mask=without)), image_negatives=1),
    )


@every_direction
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_batch_without_a_token_is_zero_and_attached_to_the_graph(
    loss: Callable[..., Tensor], reduction: str
) -> None:
    """DistributedDataParallel waits for the gradient of every parameter."""
    scale = torch.tensor(10.0, requires_grad=True)
    batch = random_batch([0, 0]).but(reduction=reduction).with_gradients().but(logit_scale=scale)
    found = loss(**vars(batch), image_negatives=1)
    found.backward()
    assert found == 0
    assert all((leaf.grad == 0).all() for leaf in (batch.patch_features, batch.token_features, scale))


@every_direction
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_in_another_image_shows(loss: Callable[..., Tensor], value: float) -> None:
    batch = random_batch([2, 0])
    batch.patch_features[1, 0, 0] = value
    assert loss(**vars(batch), image_negatives=1).isnan()


# Precision


@every_direction
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_features_are_computed_in_float32_and_their_gradients_rounded_once(
    loss: Callable[..., Tensor], dtype: torch.dtype, autocast: bool
) -> None:
    low = random_batch([4, 2, 3], dtype).with_gradients()
    single = low.but(patch_features=low.patch_features.float(), token_features=low.token_features.float())
    single = single.with_gradients()
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        found = loss(**vars(low), image_negatives=2)
    expected = loss(**vars(single), image_negatives=2)
    assert torch.equal(found, expected)
    # A power of two, which rounds nothing and keeps float16 from underflow.
    (1024 * found).backward()
    (1024 * expected).backward()
    for name in ("patch_features", "token_features"):
        # An image's gradients from its own caption and from others meet before they are rounded.
        assert torch.equal(getattr(low, name).grad, getattr(single, name).grad.to(dtype))


@every_direction
@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e-12, 1e15])
def test_features_of_any_magnitude_give_a_finite_loss(loss: Callable[..., Tensor], scale: float) -> None:
    batch = random_batch([4, 2, 3], torch.float32)
    scaled = batch.but(patch_features=batch.patch_features * scale, token_features=batch.token_features * scale)
    found = loss(**vars(scaled), image_negatives=2)
    assert found.isfinite()
    if scale in (1e-12, 1e15):
        close(found, loss(**vars(batch), image_negatives=2), rtol=1e-5, atol=1e-5)


# Bad input


@every_implementation
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"image_negatives": 0}, ValueError, "image_negatives is 0; expected a whole number of at least 1"),
        ({"image_negatives": -1}, ValueError, "image_negatives is -1; expected a whole number of at least 1"),
        ({"image_negatives": 1.0}, TypeError, "image_negatives is 1.0 (float); expected a whole number"),
        ({"image_negatives": True}, TypeError, "image_negatives is True (bool); expected a whole number"),
        ({"patch_features": torch.zeros(5, 4)}, ValueError, "patch_features has shape [5, 4]; expected rank 3"),
        ({"patch_features": torch.zeros(3, 0, 4)}, ValueError, "patch_features has P = 0 in shape [3, 0, 4]"),
        ({"token_features": torch.zeros(2, 3, 4)}, ValueError, "token_features has B = 2 in shape [2, 3, 4], patch"),
        ({"token_mask": torch.ones(3, 3)}, TypeError, "token_mask has dtype torch.float32; expected torch.bool"),
        ({"patch_mask": torch.ones(3, 3).bool()}, ValueError, "patch_mask has shape [3, 3]; expected [B, P] = [3, 5]"),
        ({"region_mask": torch.ones(3, 5, 3).bool()}, ValueError, "region_mask has shape [3, 5, 3]; expected [B, L"),
        ({"logit_scale": torch.ones(3)}, ValueError, "logit_scale has shape [3]; expected one element, 1/tau"),
        ({"threshold": 1.5}, ValueError, "threshold is 1.5; expected a number between 0 and 1"),
        ({"alignment": "max"}, ValueError, "alignment is 'max'; expected one of 'sparse', 'dense', 'softmax'"),
        ({"reduction": "mean"}, ValueError, "reduction is 'mean'; expected one of 'token', 'sample'"),
        ({"direction": "one"}, ValueError, "direction is 'one'; expected one of 'text_to_image', 'both'"),
    ],
    ids=str,
)
def test_bad_input_is_refused_by_name(
    loss: Callable[..., Tensor], changed: dict, error: type[Exception], message: str
) -> None:
    arguments = {
        "patch_features": torch.zeros(3, 5, 4),
        "token_features": torch.zeros(3, 3, 4),
        "token_mask": torch.ones(3, 3, dtype=torch.bool),
        "logit_scale": 1.0,
        "image_negatives": 1,
    }
    with pytest.raises(error, match=re.escape(message)):
        loss(**arguments | changed)


@every_direction
@pytest.mark.parametrize("reduction", REDUCTIONS)
@given(batch=batches())
@hypothesis_settings(max_examples=20)
def test_a_batch_with_too_few_other_images_is_contrasted_with_those_it_has(
    loss: Callable[..., Tensor], reduction: str, batch: Batch
) -> None:
    batch = batch.but(reduction=reduction)
    others = len(batch.token_mask) - 1
    assume(others > 0)
    expected = loss(**vars(batch), image_negatives=others)
    close(loss(**vars(batch), image_negatives=others + 5), expected)


@every_direction
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_batch_of_one_pair_gives_zero_with_a_zero_gradient(loss: Callable[..., Tensor], reduction: str) -> None:
    batch = random_batch([3]).but(reduction=reduction)
    inputs = {
        "patch_features": batch.patch_features.requires_grad_(),
        "token_features": batch.token_features.requires_grad_(),
        "logit_scale": torch.tensor(10.0, dtype=torch.float64, requires_grad=True),
    }
    value = loss(**vars(batch.but(**inputs)), image_negatives=3)
    value.backward()
    assert value == 0
    assert all((tensor.grad == 0).all() for tensor in inputs.values())
