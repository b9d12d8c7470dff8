"""What holds of the fused loss and of the fused contrast alike: `functional`'s values, gradients and refusals."""

import re
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from fused_terms import NAMES, TERMS, assert_same, loss_and_gradients, node_names, random_batch, term_of
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Batch, batches
from torch import Tensor
from torch.testing import assert_close

from sparc_loss import SparcLoss, functional, fused
from sparc_loss.functional import ALIGNMENTS, REDUCTIONS
from sparc_loss.fused import groups

pytestmark = pytest.mark.parametrize("term", TERMS)

OPTIONS = [(alignment, reduction) for alignment in ALIGNMENTS for reduction in REDUCTIONS]


# The value and the gradient


@given(
    batches(),
    st.integers(1, 8),
    st.sampled_from([1, 3000, None]),
    st.sampled_from([0.0, 0.1, 10.0, None]),
    st.booleans(),
)
@settings(max_examples=100)
def test_equals_functional_in_float64(
    term: str, batch: Batch, negatives: int, chunk_bytes: int | None, padding: float | None, recompute: bool
) -> None:
    own = dict.fromkeys(TERMS[term], negatives)
    with mock.patch.object(groups, "CPU_PADDING", padding):
        actual = loss_and_gradients(fused, term, batch, **own, chunk_bytes=chunk_bytes, recompute=recompute)
    assert_same(actual, loss_and_gradients(functional, term, batch, **own), 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize(("alignment", "reduction"), OPTIONS)
@pytest.mark.parametrize("size", [(123, 31, 47), (49, 77, 64), (1, 5, 3), (7, 3, 1)], ids=str)
def test_equals_functional_relative_to_the_norm(
    term: str, size: tuple[int, int, int], alignment: str, reduction: str, dtype: torch.dtype, tolerance: float
) -> None:
    lengths = [each % (size[1] + 1) for each in (3, 1, 0, 17, 4, 77, 5, 4, 18, 2)]
    batch = random_batch(lengths, *size, dtype=dtype).but(alignment=alignment, reduction=reduction)
    actual, expected = (loss_and_gradients(module, term, batch) for module in (fused, functional))
    # One patch or one dimension leave directions that nothing can turn: all gradients are zero but for rounding.
    floors = dict.fromkeys(expected, 0 if min(size[0], size[2]) > 1 else 10)
    if TERMS[term]:  # a mean of differences of cosines, which may be tiny beside them
        floors["logit_scale"] = max(floors["logit_scale"], 0.1)
    # Peaked softmax weights magnify rounding: float32 takes functional itself some 1e-6 from float64.
    slack = dict.fromkeys(expected, 0.0)
    if alignment == "softmax" and dtype == torch.float32:
        doubles = {name: getattr(batch, name).double() for name in NAMES[:2]}
        truth = loss_and_gradients(functional, term, batch.but(**doubles))
        slack = {name: (expected[name] - value).norm().item() for name, value in truth.items()}
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= tolerance * max(value.norm(), floors[name]) + slack[name], name


def equal_patches(batch: Batch) -> None:
    batch.patch_features[0] = batch.patch_features[0, 0]


def an_image_of_zeros(batch: Batch) -> None:
    batch.patch_features[0] = 0


def a_token_of_zeros(batch: Batch) -> None:
    batch.token_features[0, 1] = 0


def groups_that_sum_to_zero(batch: Batch) -> None:
    batch.patch_features[:2] = torch.tensor([1.0, -1, 1, -1, 1, -1])[:, None]
    batch.token_features[0] = torch.tensor([1.0, -1, 1, -1, 0])


def patches_that_share_the_minimum(batch: Batch) -> None:
    for patches in batch.patch_features[:2]:
        patches[:3] = patches[(batch.token_features[0, 0] @ patches.mT).argmin()].clone()


def a_token_that_may_use_no_patch(batch: Batch) -> Batch:
    region_mask = torch.ones(3, 4, 6, dtype=torch.bool)
    region_mask[0, 1] = False
    return batch.but(region_mask=region_mask)


def an_image_without_a_patch(batch: Batch) -> Batch:
    return batch.but(patch_mask=torch.tensor([[True], [False], [True]]).repeat(1, 6))


def no_token(batch: Batch) -> None:
    batch.token_mask[:] = False


def captions_without_a_token(batch: Batch) -> None:
    batch.token_mask[1:] = False


@pytest.mark.parametrize(
    "change",
    [
        equal_patches,
        an_image_of_zeros,
        a_token_of_zeros,
        groups_that_sum_to_zero,
        patches_that_share_the_minimum,
        a_token_that_may_use_no_patch,
        an_image_without_a_patch,
        no_token,
        captions_without_a_token,
    ],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize(("alignment", "reduction"), OPTIONS)
def test_degenerate_input_is_treated_as_in_functional(
    term: str, change: Callable[[Batch], Batch | None], alignment: str, reduction: str
) -> None:
    batch = random_batch([4, 2, 3], 6, 4, 5).but(alignment=alignment, reduction=reduction)
    batch = change(batch) or batch
    assert_same(loss_and_gradients(fused, term, batch), loss_and_gradients(functional, term, batch), 1e-12)


def test_features_of_any_strides(term: str) -> None:
    batch = random_batch([4, 2, 3], 6, 4, 5)
    strided = batch.but(
        patch_features=batch.patch_features.transpose(1, 2).contiguous().transpose(1, 2),
        token_features=torch.stack([batch.token_features] * 2, dim=-1)[..., 0],
    )
    assert_same(loss_and_gradients(fused, term, strided), loss_and_gradients(fused, term, batch), 1e-14)


# The graph


@pytest.mark.parametrize("recompute", [False, True])
def test_the_incoming_gradient_multiplies(term: str, recompute: bool) -> None:
    batch = random_batch([4, 2, 3], 6, 4, 5)
    actual = loss_and_gradients(fused, term, batch, -2.5, recompute=recompute)
    assert_same(actual, loss_and_gradients(functional, term, batch, -2.5), 1e-12)


def test_a_second_backward_through_a_retained_graph_gives_the_same(term: str) -> None:
    batch = random_batch([4, 2, 3], 6, 4, 5).with_gradients()
    loss = term_of(fused, term, batch)
    features = batch.patch_features, batch.token_features
    first = torch.autograd.grad(loss, features, torch.tensor(3.0, dtype=torch.float64), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()
    second = torch.autograd.grad(loss, features, torch.tensor(3.0, dtype=torch.float64))
    for ours, expected in zip(second, kept, strict=True):
        assert_close(ours, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("wanted", NAMES)
def test_one_input_alone_may_want_a_gradient(term: str, wanted: str) -> None:
    batch = random_batch([4, 2, 3], 6, 4, 5).but(logit_scale=torch.tensor(10.0, dtype=torch.float64))
    alone = batch.but(**{wanted: getattr(batch, wanted).clone().requires_grad_()})
    term_of(fused, term, alone).backward()
    expected = loss_and_gradients(functional, term, batch)[wanted]
    assert_close(getattr(alone, wanted).grad, expected, rtol=1e-12, atol=1e-13)


def test_create_graph_is_fine_until_a_second_derivative_is_asked_for(term: str) -> None:
    batch = random_batch([4, 2, 3], 6, 4, 5).with_gradients()
    for wanted in (batch.patch_features, batch.token_features):
        (gradient,) = torch.autograd.grad(term_of(fused, term, batch), wanted, create_graph=True)
        assert gradient.requires_grad
        with pytest.raises(RuntimeError, match='no second derivative; take implementation="eager"'):
            gradient.square().sum().backward()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_saved_for_backward_beyond_the_inputs_and_their_gradients(
    term: str, dtype: torch.dtype, recompute: bool
) -> None:
    batch = random_batch([4, 2, 3], 6, 4, 5, dtype).with_gradients()
    scale = torch.tensor(10.0, requires_grad=True)
    saved: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = term_of(fused, term, batch.but(logit_scale=scale), recompute=recompute)
    inputs = batch.patch_features, batch.token_features, batch.token_mask, scale
    assert saved == {tensor.untyped_storage().data_ptr() for tensor in inputs}
    # What autograd does not see: nothing, or the gradients, which take as much as the inputs themselves.
    held = loss.grad_fn.gradients
    if recompute or dtype == torch.float16:
        assert held is None
    else:
        features = batch.patch_features, batch.token_features, scale
        assert [(each.shape, each.dtype) for each in held] == [(each.shape, each.dtype) for each in features]
    loss.backward()
    assert loss.grad_fn.gradients is None


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_low_precision_features_are_computed_in_float32(term: str, dtype: torch.dtype, alignment: str) -> None:
    batch = random_batch([4, 2, 31, 5], 49, 31, 64, dtype).but(alignment=alignment)
    assert_rounded_once(term, batch, 0.3)


def assert_rounded_once(term: str, batch: Batch, weight: float) -> None:
    """The gradients are those of `functional` but for a last rounding, which comes before the weight."""
    actual, expected = (loss_and_gradients(module, term, batch, weight) for module in (fused, functional))
    assert_close(actual["loss"], expected["loss"], rtol=1e-6, atol=0)
    for name in NAMES[:2]:
        assert actual[name].dtype == expected[name].dtype == batch.patch_features.dtype
        ours, theirs = actual[name].float(), expected[name].float()
        assert (ours - theirs).norm() <= torch.finfo(actual[name].dtype).eps * theirs.norm()


def test_float16_gradients_do_not_vanish_before_the_loss_scaler_multiplies_them(term: str) -> None:
    batch = random_batch([4, 2, 31, 5], 49, 31, 64, torch.float16)
    batch = batch.but(patch_features=batch.patch_features * 50)
    assert_rounded_once(term, batch, 2.0**16)
    gradient = loss_and_gradients(functional, term, batch, 2.0**16)["patch_features"]
    assert (gradient.abs() / 2**16 < torch.finfo(torch.float16).tiny).float().mean() > 0.5


def test_autocast_changes_nothing(term: str) -> None:
    batch = random_batch([4, 2, 3], 6, 4, 5, torch.float32)
    expected = loss_and_gradients(fused, term, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for recompute in (False, True):
            actual = loss_and_gradients(fused, term, batch, recompute=recompute)
            assert all(torch.equal(actual[name], expected[name]) for name in expected)


# The choice in SparcLoss, and bad input


@pytest.mark.parametrize(("implementation", "taken"), [("auto", True), ("fused", True), ("eager", False)])
def test_sparc_loss_takes(term: str, implementation: str, taken: bool) -> None:
    batch = random_batch([4, 2, 0], 6, 4, 5).with_gradients()
    outputs = {name: getattr(batch, name) for name in ("patch_features", "token_features", "token_mask")}
    unit = torch.nn.functional.normalize(torch.randn(2, 3, 5), dim=-1)
    loss = SparcLoss(implementation=implementation, **TERMS[term])
    terms = loss(unit[0], unit[1], torch.tensor(10.0), **outputs, output_dict=True)
    assert node_names(terms[term]).count("_FusedLossBackward") == taken


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"chunk_bytes": 0}, "chunk_bytes is 0; expected a number of at least 1"),
        ({"patch_features": torch.zeros(2, 0, 5)}, "patch_features has P = 0 in shape [2, 0, 5]; expected at least 1"),
    ],
    ids=["chunk_bytes", "patch_features"],
)
def test_what_only_fused_refuses_so_is_refused_by_name(term: str, changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        term_of(fused, term, random_batch([2, 2], 6, 4, 5), **changed)
