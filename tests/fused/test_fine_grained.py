"""The fused loss is `functional`'s in value and gradient, and costs what its matrix products cost."""

import logging
import re
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Batch, batches
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from sparc_loss import SparcLoss, functional, fused
from sparc_loss.functional import ALIGNMENTS, REDUCTIONS
from sparc_loss.fused import groups
from sparc_loss.fused.groups import caption_slices

OPTIONS = [(alignment, reduction) for alignment in ALIGNMENTS for reduction in REDUCTIONS]


def loss_and_gradients(module, batch: Batch, weight: float = 1.0, **options: object) -> dict[str, Tensor]:
    """The loss of `functional` or `fused`, and `weight` times its gradients."""
    names = ("patch_features", "token_features", "logit_scale")
    inputs = {name: torch.as_tensor(getattr(batch, name)).detach().clone().requires_grad_() for name in names}
    loss = module.fine_grained_loss(**vars(batch.but(**inputs)), **options)
    gradients = torch.autograd.grad(loss, list(inputs.values()), torch.as_tensor(weight, dtype=loss.dtype))
    return {"loss": loss.detach(), **dict(zip(names, gradients, strict=True))}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest component, which for a sum of terms that cancel is taken to be 1."""
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype
        assert actual[name].shape == value.shape
        size = max(1.0, value.abs().max().item()) if value.numel() else 1.0
        assert_close(actual[name], value, rtol=0, atol=tolerance * size, msg=lambda text, name=name: f"{name}: {text}")


def random_batch(lengths: list[int], patches: int, length: int, dim: int, dtype: torch.dtype = torch.float64) -> Batch:
    """Caption b has lengths[b] tokens at random positions."""
    scores = torch.rand(len(lengths), length)
    mask = scores.argsort(dim=1).argsort(dim=1) < torch.tensor(lengths)[:, None]
    return Batch(
        patch_features=torch.randn(len(lengths), patches, dim, dtype=dtype),
        token_features=torch.randn(len(lengths), length, dim, dtype=dtype),
        token_mask=mask,
        logit_scale=10.0,
    )


# The value and the gradient


@given(batches(), st.sampled_from([1, 3000, None]), st.sampled_from([0.0, 0.1, 10.0, None]), st.booleans())
def test_equals_functional_in_float64(
    batch: Batch, chunk_bytes: int | None, padding: float | None, recompute: bool
) -> None:
    with mock.patch.object(groups, "CPU_PADDING", padding):
        actual = loss_and_gradients(fused, batch, chunk_bytes=chunk_bytes, recompute=recompute)
    assert_same(actual, loss_and_gradients(functional, batch), 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize(("alignment", "reduction"), OPTIONS)
@pytest.mark.parametrize("size", [(123, 31, 47), (49, 77, 64), (1, 5, 3), (7, 3, 1)], ids=str)
def test_equals_functional_relative_to_the_norm(
    size: tuple[int, int, int], alignment: str, reduction: str, dtype: torch.dtype, tolerance: float
) -> None:
    lengths = [each % (size[1] + 1) for each in (3, 1, 0, 17, 4, 77, 5, 4, 18, 2)]
    batch = random_batch(lengths, *size, dtype=dtype).but(alignment=alignment, reduction=reduction)
    actual, expected = loss_and_gradients(fused, batch), loss_and_gradients(functional, batch)
    # One patch or one dimension leave directions that nothing can turn: all gradients are zero but for rounding.
    floor = 0 if min(size[0], size[2]) > 1 else 10
    # Peaked softmax weights magnify rounding: float32 takes functional itself some 1e-6 from float64.
    slack = dict.fromkeys(expected, 0.0)
    if alignment == "softmax" and dtype == torch.float32:
        doubles = {name: getattr(batch, name).double() for name in ("patch_features", "token_features")}
        truth = loss_and_gradients(functional, batch.but(**doubles))
        slack = {name: (expected[name] - value).norm().item() for name, value in truth.items()}
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= tolerance * max(value.norm(), floor) + slack[name], name


@pytest.mark.parametrize(("alignment", "reduction"), OPTIONS)
def test_gradcheck(alignment: str, reduction: str) -> None:
    batch = random_batch([3, 2, 0, 4], 6, 4, 5).but(alignment=alignment, reduction=reduction, threshold=0.3)
    batch = batch.but(region_mask=torch.rand(4, 4, 6) < 0.8, patch_mask=torch.rand(4, 6) < 0.8)
    scale = torch.tensor(5.0, dtype=torch.float64)

    def loss(patch_features: Tensor, token_features: Tensor, logit_scale: Tensor) -> Tensor:
        changed = batch.but(patch_features=patch_features, token_features=token_features, logit_scale=logit_scale)
        return fused.fine_grained_loss(**vars(changed))

    inputs = [tensor.clone().requires_grad_() for tensor in (batch.patch_features, batch.token_features, scale)]
    assert torch.autograd.gradcheck(loss, inputs)


def degenerate(name: str) -> Batch:
    batch = random_batch([4, 2, 3], 6, 4, 5)
    if name == "equal patches":
        batch.patch_features[0] = batch.patch_features[0, 0]
    elif name == "an image of zeros":
        batch.patch_features[0] = 0
    elif name == "a token of zeros":
        batch.token_features[0, 1] = 0
    elif name == "a group that sums to zero":
        batch.patch_features[0] = torch.tensor([1.0, -1, 1, -1, 1, -1])[:, None]
        batch.token_features[0] = torch.tensor([1.0, -1, 1, -1, 0])
    elif name == "patches that share the minimum":
        lowest = (batch.token_features[:, :1] @ batch.patch_features.mT).argmin(dim=-1)
        batch.patch_features[0, :3] = batch.patch_features[0, lowest[0]]
    elif name == "a token that may use no patch":
        batch = batch.but(region_mask=torch.ones(3, 4, 6, dtype=torch.bool))
        batch.region_mask[0, 1] = False
    elif name == "an image without a patch":
        batch = batch.but(patch_mask=torch.ones(3, 6, dtype=torch.bool))
        batch.patch_mask[1] = False
    elif name == "no token":
        batch.token_mask[:] = False
    return batch


@pytest.mark.parametrize(
    "name",
    [
        "equal patches",
        "an image of zeros",
        "a token of zeros",
        "a group that sums to zero",
        "patches that share the minimum",
        "a token that may use no patch",
        "an image without a patch",
        "no token",
    ],
)
@pytest.mark.parametrize(("alignment", "reduction"), OPTIONS)
def test_degenerate_cases_equal_functional(name: str, alignment: str, reduction: str) -> None:
    batch = degenerate(name).but(alignment=alignment, reduction=reduction)
    assert_same(loss_and_gradients(fused, batch), loss_and_gradients(functional, batch), 1e-12)


@pytest.mark.parametrize("sizes", [(0, 5, 3), (2, 5, 0)], ids=["no pair", "no token"])
def test_empty_tensors_give_zero_attached_to_the_graph(sizes: tuple[int, int, int]) -> None:
    b, p, length = sizes
    inputs = torch.zeros(b, p, 4, requires_grad=True), torch.zeros(b, length, 4, requires_grad=True)
    loss = fused.fine_grained_loss(*inputs, torch.ones(b, length, dtype=torch.bool), 10.0)
    loss.backward()
    assert loss == 0
    assert all((tensor.grad == 0).all() for tensor in inputs)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("features", ["patch_features", "token_features"])
@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_nan_and_infinity_in_a_feature_that_counts_show_in_the_loss(
    value: float, features: str, alignment: str
) -> None:
    batch = random_batch([4, 1], 6, 4, 5).but(alignment=alignment)
    for pair in range(2):
        changed = batch.but(**{features: getattr(batch, features).clone()})
        position = batch.token_mask[pair].nonzero()[0].item() if features == "token_features" else 1
        getattr(changed, features)[pair, position, 2] = value
        assert fused.fine_grained_loss(**vars(changed)).isnan()


@pytest.mark.parametrize("padding", [0.0, 10.0, None])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_what_masked_tokens_hold_changes_nothing(padding: float, value: float) -> None:
    batch = random_batch([4, 2, 0, 1, 3], 6, 4, 5)
    token_features = batch.token_features.masked_fill(~batch.token_mask[..., None], value)
    with mock.patch.object(groups, "CPU_PADDING", padding):
        expected = loss_and_gradients(fused, batch)
        actual = loss_and_gradients(fused, batch.but(token_features=token_features))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_what_stands_in_the_place_of_a_token_may_have_no_patch() -> None:
    batch = random_batch([4, 2, 0, 1, 3], 6, 4, 5)
    batch = batch.but(region_mask=batch.token_mask[..., None].expand(-1, -1, 6).clone())
    with mock.patch.object(groups, "CPU_PADDING", 10.0):
        assert_same(loss_and_gradients(fused, batch), loss_and_gradients(functional, batch), 1e-12)


def test_features_of_any_strides() -> None:
    batch = random_batch([4, 2, 3], 6, 4, 5)
    strided = batch.but(
        patch_features=batch.patch_features.transpose(1, 2).contiguous().transpose(1, 2),
        token_features=torch.stack([batch.token_features] * 2, dim=-1)[..., 0],
    )
    assert_same(loss_and_gradients(fused, strided), loss_and_gradients(fused, batch), 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_logit_scale_of_one_element_has_a_gradient_of_its_own_shape_and_dtype(dtype: torch.dtype) -> None:
    batch = random_batch([4, 2, 3], 6, 4, 5, torch.float32)
    scale = torch.tensor([10.0], dtype=dtype, requires_grad=True)
    loss = fused.fine_grained_loss(**vars(batch.but(logit_scale=scale)))
    loss.backward()
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert (scale.grad.shape, scale.grad.dtype) == ((1,), dtype)
    assert_close(scale.grad.item(), loss_and_gradients(functional, batch)["logit_scale"].item())


# The graph


@pytest.mark.parametrize("recompute", [False, True])
def test_the_incoming_gradient_multiplies(recompute: bool) -> None:
    batch = random_batch([4, 2, 3], 6, 4, 5)
    actual = loss_and_gradients(fused, batch, weight=-2.5, recompute=recompute)
    assert_same(actual, loss_and_gradients(functional, batch, weight=-2.5), 1e-12)


def test_a_second_backward_through_a_retained_graph_gives_the_same() -> None:
    batch = random_batch([4, 2, 3], 6, 4, 5).with_gradients()
    loss = fused.fine_grained_loss(**vars(batch))
    features = batch.patch_features, batch.token_features
    first = torch.autograd.grad(loss, features, torch.tensor(3.0, dtype=torch.float64), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()
    second = torch.autograd.grad(loss, features, torch.tensor(3.0, dtype=torch.float64))
    for ours, expected in zip(second, kept, strict=True):
        assert_close(ours, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("wanted", ["patch_features", "token_features", "logit_scale"])
def test_one_input_alone_may_want_a_gradient(wanted: str) -> None:
    batch = random_batch([4, 2, 3], 6, 4, 5)
    batch = batch.but(logit_scale=torch.tensor(10.0, dtype=torch.float64))
    alone = batch.but(**{wanted: getattr(batch, wanted).clone().requires_grad_()})
    fused.fine_grained_loss(**vars(alone)).backward()
    assert_close(getattr(alone, wanted).grad, loss_and_gradients(functional, batch)[wanted], rtol=1e-12, atol=1e-13)


def test_create_graph_is_fine_until_a_second_derivative_is_asked_for() -> None:
    batch = random_batch([4, 2, 3], 6, 4, 5).with_gradients()
    for wanted in (batch.patch_features, batch.token_features):
        loss = fused.fine_grained_loss(**vars(batch))
        (gradient,) = torch.autograd.grad(loss, wanted, create_graph=True)
        assert gradient.requires_grad
        with pytest.raises(RuntimeError, match='no second derivative; take implementation="eager"'):
            gradient.square().sum().backward()


# What it costs


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_multiplications_are_those_of_valid_tokens(alignment: str) -> None:
    n, p, d = [3, 1, 0, 17, 4, 17], 23, 19
    batch = random_batch(n, p, 20, d).but(alignment=alignment)
    pairs, squares = sum(n) * p * d, sum(each * each for each in n) * d
    value, gradient = 4 * pairs + 2 * squares, 8 * pairs + 4 * squares
    # One caption at a time: nothing is padded.
    assert flops(batch, chunk_bytes=1) == value + gradient
    assert flops(batch, chunk_bytes=1, recompute=True) == 2 * value + gradient
    assert flops(batch) <= 1.1**2 * (value + gradient)
    with torch.no_grad():
        assert flops(batch, chunk_bytes=1) == value


def flops(batch: Batch, **options: object) -> int:
    batch = batch.with_gradients()
    with FlopCounterMode(display=False) as counter:
        loss = fused.fine_grained_loss(**vars(batch), **options)
        if loss.requires_grad:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_saved_for_backward_beyond_the_inputs(dtype: torch.dtype, recompute: bool) -> None:
    batch = random_batch([4, 2, 3], 6, 4, 5, dtype).with_gradients()
    saved: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    scale = torch.tensor(10.0, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = fused.fine_grained_loss(**vars(batch.but(logit_scale=scale)), recompute=recompute)
    inputs = batch.patch_features, batch.token_features, batch.token_mask, scale
    assert saved == {tensor.untyped_storage().data_ptr() for tensor in inputs}
    # What autograd does not see: nothing, or the gradients, which take as much as the inputs themselves.
    held = loss.grad_fn.gradients
    if recompute or dtype == torch.float16:
        assert held is None
    else:
        features = batch.patch_features, batch.token_features, scale
        assert [(each.shape, each.dtype) for each in held] == [(each.shape, each.dtype) for each in features]


def test_the_gradients_are_let_go_in_backward() -> None:
    batch = random_batch([4, 2, 3], 6, 4, 5).with_gradients()
    loss = fused.fine_grained_loss(**vars(batch))
    loss.backward()
    assert loss.grad_fn.gradients is None


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_low_precision_features_are_computed_in_float32(dtype: torch.dtype, alignment: str) -> None:
    batch = random_batch([4, 2, 31, 5], 49, 31, 64, dtype).but(alignment=alignment)
    actual, expected = loss_and_gradients(fused, batch, 0.3), loss_and_gradients(functional, batch, 0.3)
    assert_close(actual["loss"], expected["loss"], rtol=1e-6, atol=0)
    for name in ("patch_features", "token_features"):
        assert actual[name].dtype == expected[name].dtype == dtype
        ours, theirs = actual[name].float(), expected[name].float()
        # Rounded twice, once before it is multiplied by 0.3.
        assert (ours - theirs).norm() <= torch.finfo(dtype).eps * theirs.norm()


def test_float16_gradients_do_not_vanish_before_the_loss_scaler_multiplies_them() -> None:
    batch = random_batch([4, 2, 31, 5], 49, 31, 64, torch.float16)
    batch = batch.but(patch_features=batch.patch_features * 50)
    actual, expected = loss_and_gradients(fused, batch, 2.0**16), loss_and_gradients(functional, batch, 2.0**16)
    assert (expected["patch_features"].abs() / 2**16 < torch.finfo(torch.float16).tiny).float().mean() > 0.5
    ours, theirs = actual["patch_features"].float(), expected["patch_features"].float()
    assert (ours - theirs).norm() <= torch.finfo(torch.float16).eps * theirs.norm()


def test_autocast_changes_nothing() -> None:
    batch = random_batch([4, 2, 3], 6, 4, 5, torch.float32)
    expected = loss_and_gradients(fused, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for recompute in (False, True):
            actual = loss_and_gradients(fused, batch, recompute=recompute)
            assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_rounding_does_not_pass_through_peaked_softmax_weights() -> None:
    batch = random_batch([4, 2, 31, 5], 49, 31, 64, torch.float32).but(alignment="softmax")
    # Some similarities are far above the rest: the weights are 0 and 1, and nothing flows through them.
    batch = batch.but(token_features=100 * batch.token_features)
    actual, expected = loss_and_gradients(fused, batch), loss_and_gradients(functional, batch)
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= 1e-6 * value.norm(), name


def test_a_similarity_of_exactly_one_over_p_is_kept() -> None:
    # A third rounded to float32 is above a third in float64.
    patches = torch.tensor([[[0.0, 1], [1, 0.5], [3, 2]]], dtype=torch.float64)
    tokens = torch.tensor([[[1.0, 0], [2, 1]]], dtype=torch.float64)
    batch = Batch(patches, tokens, torch.ones(1, 2, dtype=torch.bool), logit_scale=10.0)
    assert batch.weights()[0, 0, 1] > 0
    assert_same(loss_and_gradients(fused, batch), loss_and_gradients(functional, batch), 1e-12)


@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e-12, 1e15])
def test_features_of_any_magnitude_give_functionals_loss_and_a_finite_one(scale: float) -> None:
    batch = random_batch([4, 2, 3], 6, 4, 5, torch.float32)
    batch = batch.but(patch_features=batch.patch_features * scale, token_features=batch.token_features * scale)
    loss = fused.fine_grained_loss(**vars(batch))
    assert loss.isfinite()
    assert_close(loss, batch.loss(), rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize(("implementation", "taken"), [("auto", "fused"), ("fused", "fused"), ("eager", "eager")])
def test_sparc_loss_takes(outputs: dict[str, Tensor], implementation: str, taken: str) -> None:
    loss = SparcLoss(implementation=implementation)(**outputs, output_dict=True)["fine_grained_loss"]
    assert node_names(loss).count("_FusedLossBackward") == (taken == "fused")


def node_names(tensor: Tensor) -> list[str]:
    nodes, names = [tensor.grad_fn], []
    while nodes:
        node = nodes.pop()
        names.append(node.name())
        nodes += [each for each, _ in node.next_functions if each is not None]
    return names


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


# Bad input


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"patch_features": torch.zeros(2, 0, 4)},
            ValueError,
            "patch_features has shape [2, 0, 4]; expected at least",
        ),
        ({"patch_features": torch.zeros(5, 4)}, ValueError, "patch_features has shape [5, 4]; expected rank 3"),
        ({"token_features": torch.zeros(2, 3, 4).long()}, TypeError, "token_features has dtype torch.int64; expected"),
        ({"token_mask": torch.ones(2, 3)}, TypeError, "token_mask has dtype torch.float32; expected torch.bool"),
        ({"patch_mask": torch.ones(2, 3).bool()}, ValueError, "patch_mask has shape [2, 3]; expected [B, P] = [2, 5]"),
        ({"logit_scale": torch.ones(3)}, ValueError, "logit_scale has shape [3]; expected one element, 1/tau"),
        ({"threshold": 1.5}, ValueError, "threshold is 1.5; expected a number between 0 and 1"),
        ({"alignment": "max"}, ValueError, "alignment is 'max'; expected one of 'sparse', 'dense', 'softmax'"),
        ({"reduction": "mean"}, ValueError, "reduction is 'mean'; expected one of 'token', 'sample'"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes is 0; expected a number of at least 1"),
    ],
    ids=str,
)
def test_bad_input_is_refused_by_name(changed: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "patch_features": torch.zeros(2, 5, 4),
        "token_features": torch.zeros(2, 3, 4),
        "token_mask": torch.ones(2, 3, dtype=torch.bool),
        "logit_scale": 1.0,
    }
    with pytest.raises(error, match=re.escape(message)):
        fused.fine_grained_loss(**arguments | changed)
