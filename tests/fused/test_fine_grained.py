"""The fused loss alone: its gradient, what it costs, and when SparcLoss takes it."""

import logging
from unittest import mock

import pytest
import torch
from fused_terms import assert_same, flops, loss_and_gradients, node_names, random_batch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Batch
from torch import Tensor
from torch.testing import assert_close

from sparc_loss import SparcLoss, functional, fused
from sparc_loss.functional import ALIGNMENTS, REDUCTIONS
from sparc_loss.fused import groups
from sparc_loss.fused.groups import caption_slices

TERM = "fine_grained_loss"


# The value and the gradient


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_gradcheck(alignment: str, reduction: str) -> None:
    batch = random_batch([3, 2, 0, 4], 6, 4, 5).but(alignment=alignment, reduction=reduction, threshold=0.3)
    batch = batch.but(region_mask=torch.rand(4, 4, 6) < 0.8, patch_mask=torch.rand(4, 6) < 0.8)
    scale = torch.tensor(5.0, dtype=torch.float64)

    def loss(patch_features: Tensor, token_features: Tensor, logit_scale: Tensor) -> Tensor:
        changed = batch.but(patch_features=patch_features, token_features=token_features, logit_scale=logit_scale)
        return fused.fine_grained_loss(**vars(changed))

    inputs = [tensor.clone().requires_grad_() for tensor in (batch.patch_features, batch.token_features, scale)]
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("sizes", [(0, 5, 3), (2, 5, 0)], ids=["no pair", "no token"])
def test_empty_tensors_give_zero_attached_to_the_graph(sizes: tuple[int, int, int]) -> None:
    b, p, length = sizes
    inputs = torch.zeros(b, p, 4, requires_grad=True), torch.zeros(b, length, 4, requires_grad=True)
    loss = fused.fine_grained_loss(*inputs, torch.ones(b, length, dtype=torch.bool), 10.0)
    loss.backward()
    assert loss == 0
    assert all((tensor.grad == 0).all() for tensor in inputs)


@pytest.mark.parametrize("padding", [0.0, 10.0, None])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_what_masked_tokens_hold_changes_nothing(padding: float, value: float) -> None:
    batch = random_batch([4, 2, 0, 1, 3], 6, 4, 5)
    token_features = batch.token_features.masked_fill(~batch.token_mask[..., None], value)
    with mock.patch.object(groups, "CPU_PADDING", padding):
        expected = loss_and_gradients(fused, TERM, batch)
        actual = loss_and_gradients(fused, TERM, batch.but(token_features=token_features))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_what_stands_in_the_place_of_a_token_may_have_no_patch() -> None:
    batch = random_batch([4, 2, 0, 1, 3], 6, 4, 5)
    batch = batch.but(region_mask=batch.token_mask[..., None].expand(-1, -1, 6).clone())
    with mock.patch.object(groups, "CPU_PADDING", 10.0):
        assert_same(loss_and_gradients(fused, TERM, batch), loss_and_gradients(functional, TERM, batch), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_logit_scale_of_one_element_has_a_gradient_of_its_own_shape_and_dtype(dtype: torch.dtype) -> None:
    batch = random_batch([4, 2, 3], 6, 4, 5, torch.float32)
    scale = torch.tensor([10.0], dtype=dtype, requires_grad=True)
    loss = fused.fine_grained_loss(**vars(batch.but(logit_scale=scale)))
    loss.backward()
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert (scale.grad.shape, scale.grad.dtype) == ((1,), dtype)
    assert_close(scale.grad.item(), loss_and_gradients(functional, TERM, batch)["logit_scale"].item())


# What it costs


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_multiplications_are_those_of_valid_tokens(alignment: str) -> None:
    n, p, d = [3, 1, 0, 17, 4, 17], 23, 19
    batch = random_batch(n, p, 20, d).but(alignment=alignment)
    pairs, squares = sum(n) * p * d, sum(each * each for each in n) * d
    value, gradient = 4 * pairs + 2 * squares, 8 * pairs + 4 * squares
    # One caption at a time: nothing is padded.
    assert flops(TERM, batch, chunk_bytes=1) == value + gradient
    assert flops(TERM, batch, chunk_bytes=1, recompute=True) == 2 * value + gradient
    assert flops(TERM, batch) <= 1.1**2 * (value + gradient)
    with torch.no_grad():
        assert flops(TERM, batch, chunk_bytes=1) == value


@given(
    st.lists(st.integers(0, 77), max_size=60).map(sorted),
    st.integers(1, 300),
    st.integers(1, 100),
    st.integers(1, 10**6),
    st.sampled_from([0.0, 0.1, 0.5]),
)
def test_groups_hold_every_caption_once_within_their_bounds(
    numbers: list[int], patches: int, dim: int, chunk_bytes: int, padding: float
) -> None:
    seen = []
    for group, longest in caption_slices(numbers, (len(numbers), patches, dim), 4, chunk_bytes, padding):
        held = numbers[group]
        seen += held
        assert longest == max(held)
        assert len(held) * longest <= (1 + padding) * sum(held)
        assert len(held) == 1 or len(held) * 4 * (2 * patches + 12 * longest) * dim <= chunk_bytes
    assert sorted(seen) == [number for number in numbers if number]


# Precision


def test_rounding_does_not_pass_through_peaked_softmax_weights() -> None:
    batch = random_batch([4, 2, 31, 5], 49, 31, 64, torch.float32).but(alignment="softmax")
    # Some similarities are far above the rest: the weights are 0 and 1, and nothing flows through them.
    batch = batch.but(token_features=100 * batch.token_features)
    actual, expected = loss_and_gradients(fused, TERM, batch), loss_and_gradients(functional, TERM, batch)
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= 1e-6 * value.norm(), name


def test_a_similarity_of_exactly_one_over_p_is_kept() -> None:
    # A third rounded to float32 is above a third in float64.
    patches = torch.tensor([[[0.0, 1], [1, 0.5], [3, 2]]], dtype=torch.float64)
    tokens = torch.tensor([[[1.0, 0], [2, 1]]], dtype=torch.float64)
    batch = Batch(patches, tokens, torch.ones(1, 2, dtype=torch.bool), logit_scale=10.0)
    assert batch.weights()[0, 0, 1] > 0
    assert_same(loss_and_gradients(fused, TERM, batch), loss_and_gradients(functional, TERM, batch), 1e-12)


# The choice in SparcLoss


@pytest.fixture
def outputs() -> dict[str, Tensor]:
    """What a surfaced model returns in training mode."""
    unit = torch.nn.functional.normalize(torch.randn(2, 3, 5), dim=-1)
    batch = random_batch([4, 2, 0], 6, 4, 5, torch.float32).with_gradients()
    return {
        "image_features": unit[0],
        "text_features": unit[1],
        "logit_scale": torch.tensor(10.0),
        "patch_features": batch.patch_features,
        "token_features": batch.token_features,
        "token_mask": batch.token_mask,
    }


def test_auto_says_at_debug_level_what_it_took_once(
    outputs: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    loss = SparcLoss()
    with caplog.at_level(logging.DEBUG, logger="sparc_loss"):
        loss(**outputs)
        loss(**outputs)
    assert caplog.messages == ["implementation='auto' uses the fused fine-grained loss on cpu"]


def test_auto_takes_eager_elsewhere(outputs: dict[str, Tensor], caplog: pytest.LogCaptureFixture) -> None:
    elsewhere = {name: tensor.to("meta") for name, tensor in outputs.items()}
    with (
        mock.patch("sparc_loss.functional.fine_grained_loss", return_value=torch.tensor(2.0)) as eager,
        caplog.at_level(logging.DEBUG, logger="sparc_loss"),
    ):
        SparcLoss(global_weight=0, global_loss=torch.nn.Identity())(**elsewhere)
    assert eager.called
    assert caplog.messages == ["implementation='auto' uses the eager fine-grained loss on meta"]


def test_auto_takes_eager_while_compiling_and_says_so(
    outputs: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    torch.compiler.reset()
    loss = SparcLoss()
    with caplog.at_level(logging.DEBUG, logger="sparc_loss"):
        compiled = torch.compile(loss, backend="eager", fullgraph=True)(**outputs)
    said = {message for name, _, message in caplog.record_tuples if name.startswith("sparc_loss")}
    assert said == {"implementation='auto' uses the eager fine-grained loss inside torch.compile"}
    assert "_FusedLossBackward" not in node_names(compiled)


def test_fused_breaks_the_graph_of_a_compiled_caller_and_is_in_no_graph(outputs: dict[str, Tensor]) -> None:
    torch.compiler.reset()
    loss = SparcLoss(implementation="fused")
    code: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        code.append(module.code)
        return module

    compiled = torch.compile(loss, backend=backend)(**outputs)
    assert_close(compiled, loss(**outputs))
    assert "_FusedLossBackward" in node_names(compiled)
    assert "cross_entropy" in "".join(code)
    assert "sort" not in "".join(code)
