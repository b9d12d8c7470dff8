"""The fused contrast with other images is `functional`'s in value and gradient, and costs 1 + K alignments."""

from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from strategies import Batch, batches
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from sparc_loss import SparcLoss, functional, fused
from sparc_loss.functional import ALIGNMENTS, DIRECTIONS, REDUCTIONS
from sparc_loss.fused import groups, highest_patch, highest_patch_by_image, image_contrast
from sparc_loss.fused.groups import caption_slices

NAMES = ("patch_features", "token_features", "logit_scale")


def loss_and_gradients(module, batch: Batch, weight: float = 1.0, **options: object) -> dict[str, Tensor]:
    """The contrast of `functional` or `fused`, and `weight` times its gradients."""
    inputs = {name: torch.as_tensor(getattr(batch, name)).detach().clone() for name in NAMES}
    if batch.patch_features.dtype == torch.float64:
        inputs["logit_scale"] = inputs["logit_scale"].double()
    for each in inputs.values():
        each.requires_grad_()
    loss = module.image_contrastive_loss(**vars(batch.but(**inputs)), **options)
    gradients = torch.autograd.grad(loss, list(inputs.values()), torch.as_tensor(weight, dtype=loss.dtype))
    return {"loss": loss.detach(), **dict(zip(NAMES, gradients, strict=True))}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest component, which for a sum of terms that cancel is taken to be 1."""
    for name, value in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (value.dtype, value.shape)
        size = max(1.0, value.abs().max().item())
        assert_close(actual[name], value, rtol=0, atol=tolerance * size, msg=lambda text, name=name: f"{name}: {text}")


def random_batch(lengths: list[int], patches: int, length: int, dim: int, dtype: torch.dtype = torch.float64) -> Batch:
    """Caption b has lengths[b] tokens at random positions."""
    mask = torch.rand(len(lengths), length).argsort(dim=1).argsort(dim=1) < torch.tensor(lengths)[:, None]
    return Batch(
        patch_features=torch.randn(len(lengths), patches, dim, dtype=dtype),
        token_features=torch.randn(len(lengths), length, dim, dtype=dtype),
        token_mask=mask,
        logit_scale=10.0,
    )


# The value and the gradient


@given(
    batches(),
    st.integers(1, 8),
    st.sampled_from([1, 3000, None]),
    st.sampled_from([0.0, 0.1, 10.0, None]),
    st.booleans(),
)
@hypothesis_settings(max_examples=100)
def test_equals_functional_in_float64(
    batch: Batch, negatives: int, chunk_bytes: int | None, padding: float, recompute: bool
) -> None:
    assume(negatives < len(batch.token_mask))
    with mock.patch.object(groups, "CPU_PADDING", padding):
        actual = loss_and_gradients(
            fused, batch, image_negatives=negatives, chunk_bytes=chunk_bytes, recompute=recompute
        )
    assert_same(actual, loss_and_gradients(functional, batch, image_negatives=negatives), 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize(
    ("alignment", "reduction"), [(alignment, reduction) for alignment in ALIGNMENTS for reduction in REDUCTIONS]
)
def test_equals_functional_relative_to_the_norm(
    alignment: str, reduction: str, dtype: torch.dtype, tolerance: float
) -> None:
    batch = random_batch([3, 1, 0, 17, 4, 31, 5, 4, 18, 2], 49, 31, 64, dtype)
    batch = batch.but(alignment=alignment, reduction=reduction)
    actual, expected = (loss_and_gradients(module, batch, image_negatives=3) for module in (fused, functional))
    # Peaked softmax weights magnify rounding: float32 takes functional itself some 1e-6 from float64.
    slack = dict.fromkeys(expected, 0.0)
    if alignment == "softmax" and dtype == torch.float32:
        doubles = {name: getattr(batch, name).double() for name in NAMES[:2]}
        truth = loss_and_gradients(functional, batch.but(**doubles), image_negatives=3)
        slack = {name: (expected[name] - value).norm().item() for name, value in truth.items()}
    for name, value in expected.items():
        # The scale's is a mean of differences of cosines, which may be tiny beside them.
        size = max(value.norm(), 0.1 if name == "logit_scale" else 0)
        assert (actual[name] - value).norm() <= tolerance * size + slack[name], name


def equal_patches(batch: Batch) -> None:
    batch.patch_features[0] = batch.patch_features[0, 0]


def an_image_of_zeros(batch: Batch) -> None:
    batch.patch_features[0] = 0


def a_token_of_zeros(batch: Batch) -> None:
    batch.token_features[0, 1] = 0


def a_group_that_sums_to_zero(batch: Batch) -> None:
    batch.patch_features[1] = torch.tensor([1.0, -1, 1, -1, 1, -1])[:, None]
    batch.token_features[0] = torch.tensor([1.0, -1, 1, -1, 0])


def patches_that_share_the_minimum(batch: Batch) -> None:
    lowest = (batch.token_features[0, 0] @ batch.patch_features[1].mT).argmin()
    batch.patch_features[1, :3] = batch.patch_features[1, lowest]


def no_token(batch: Batch) -> None:
    batch.token_mask[:] = False


def captions_without_a_token(batch: Batch) -> None:
    batch.token_mask[1:] = False


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize(
    "change",
    [
        equal_patches,
        an_image_of_zeros,
        a_token_of_zeros,
        a_group_that_sums_to_zero,
        patches_that_share_the_minimum,
        no_token,
        captions_without_a_token,
    ],
    ids=lambda change: change.__name__,
)
def test_degenerate_input_is_treated_as_in_functional(change: Callable[[Batch], None], alignment: str) -> None:
    batch = random_batch([4, 2, 3], 6, 4, 5).but(alignment=alignment)
    change(batch)
    actual, expected = (loss_and_gradients(module, batch, image_negatives=2) for module in (fused, functional))
    assert_same(actual, expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", [0.3, 2.0**16])
def test_low_precision_gradients_are_rounded_as_in_functional(dtype: torch.dtype, weight: float) -> None:
    batch = random_batch([4, 2, 31, 5], 49, 31, 64, dtype)
    # So large that a float16 gradient vanishes before the loss scaler multiplies it.
    batch = batch.but(patch_features=batch.patch_features * 50)
    actual, expected = (loss_and_gradients(module, batch, weight, image_negatives=3) for module in (fused, functional))
    assert_close(actual["loss"], expected["loss"], rtol=1e-6, atol=0)
    for name in NAMES[:2]:
        assert actual[name].dtype == dtype
        ours, theirs = actual[name].float(), expected[name].float()
        assert (ours - theirs).norm() <= torch.finfo(dtype).eps * theirs.norm()


def test_features_of_any_strides() -> None:
    batch = random_batch([4, 2, 3], 6, 4, 5)
    strided = batch.but(
        patch_features=batch.patch_features.transpose(1, 2).contiguous().transpose(1, 2),
        token_features=torch.stack([batch.token_features] * 2, dim=-1)[..., 0],
    )
    actual, expected = (loss_and_gradients(fused, each, image_negatives=2) for each in (strided, batch))
    assert_same(actual, expected, 1e-14)


# The graph


@pytest.mark.parametrize("recompute", [False, True])
def test_the_incoming_gradient_multiplies(recompute: bool) -> None:
    batch = random_batch([4, 2, 3], 6, 4, 5)
    actual = loss_and_gradients(fused, batch, -2.5, image_negatives=2, recompute=recompute)
    assert_same(actual, loss_and_gradients(functional, batch, -2.5, image_negatives=2), 1e-12)


@pytest.mark.parametrize("wanted", NAMES)
def test_one_input_alone_may_want_a_gradient(wanted: str) -> None:
    batch = random_batch([4, 2, 3], 6, 4, 5).but(logit_scale=torch.tensor(10.0, dtype=torch.float64))
    alone = batch.but(**{wanted: getattr(batch, wanted).clone().requires_grad_()})
    fused.image_contrastive_loss(**vars(alone), image_negatives=2).backward()
    expected = loss_and_gradients(functional, batch, image_negatives=2)[wanted]
    assert_close(getattr(alone, wanted).grad, expected, rtol=1e-12, atol=1e-13)


def test_a_second_backward_through_a_retained_graph_gives_the_same() -> None:
    batch = random_batch([4, 2, 3], 6, 4, 5).with_gradients()
    loss = fused.image_contrastive_loss(**vars(batch), image_negatives=2)
    features = batch.patch_features, batch.token_features
    first = [each.clone() for each in torch.autograd.grad(3 * loss, features, retain_graph=True)]
    second = torch.autograd.grad(3 * loss, features)
    for ours, expected in zip(second, first, strict=True):
        assert_close(ours, expected, rtol=1e-14, atol=1e-14)


def test_a_second_derivative_is_refused_by_name() -> None:
    batch = random_batch([4, 2, 3], 6, 4, 5).with_gradients()
    loss = fused.image_contrastive_loss(**vars(batch), image_negatives=2)
    (gradient,) = torch.autograd.grad(loss, batch.patch_features, create_graph=True)
    with pytest.raises(RuntimeError, match='no second derivative; take implementation="eager"'):
        gradient.square().sum().backward()


# What it costs


@pytest.mark.parametrize("negatives", [1, 3])
def test_multiplications_are_those_of_one_plus_k_alignments_of_valid_tokens(negatives: int) -> None:
    n, p, d = [3, 1, 0, 17, 4, 17], 23, 19
    batch = random_batch(n, p, 20, d)
    value, gradient = ((1 + negatives) * each * sum(n) * p * d for each in (4, 8))
    # One caption at a time: nothing is padded.
    options = {"image_negatives": negatives, "chunk_bytes": 1}
    assert flops(batch, **options) == value + gradient
    assert flops(batch, **options, recompute=True) == 2 * value + gradient
    assert flops(batch, image_negatives=negatives) <= 1.1 * (value + gradient)
    with torch.no_grad():
        assert flops(batch, **options) == value


def flops(batch: Batch, **options: object) -> int:
    batch = batch.with_gradients()
    with FlopCounterMode(display=False) as counter:
        loss = fused.image_contrastive_loss(**vars(batch), **options)
        if loss.requires_grad:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_saved_for_backward_beyond_the_inputs_and_their_gradients(
    dtype: torch.dtype, recompute: bool
) -> None:
    batch = random_batch([4, 2, 3], 6, 4, 5, dtype).with_gradients()
    scale = torch.tensor(10.0, requires_grad=True)
    saved: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = fused.image_contrastive_loss(
            **vars(batch.but(logit_scale=scale)), image_negatives=2, recompute=recompute
        )
    inputs = batch.patch_features, batch.token_features, batch.token_mask, scale
    assert saved == {tensor.untyped_storage().data_ptr() for tensor in inputs}
    held = loss.grad_fn.gradients
    if recompute or dtype == torch.float16:
        assert held is None
    else:
        features = batch.patch_features, batch.token_features, scale
        assert [(each.shape, each.dtype) for each in held] == [(each.shape, each.dtype) for each in features]
    loss.backward()
    assert loss.grad_fn.gradients is None


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
        found = loss_and_gradients(fused, batch, 0.5, **options)
    assert_same(found, loss_and_gradients(functional, batch, 0.5, **options), 1e-10)


def test_patches_that_are_equally_high_share_the_weight() -> None:
    batch = random_batch([4, 2, 3], 6, 4, 5).but(threshold=1.0)
    batch.patch_features[1, 3] = batch.patch_features[1, 0] = 9 * batch.token_features[1, 0]
    options = {"image_negatives": 2, "direction": "both"}
    assert_same(loss_and_gradients(fused, batch, **options), loss_and_gradients(functional, batch, **options), 1e-10)


def test_the_highest_patch_alone_costs_one_product_an_image() -> None:
    batch = random_batch([5] * 8, 20, 5, 16, torch.float32)

    def flops(threshold: float, **options: object) -> int:
        with FlopCounterMode(display=False) as counter:
            loss_and_gradients(fused, batch.but(threshold=threshold), image_negatives=3, **options)
        return counter.get_total_flops()

    product = 2 * 4 * 8 * 5 * 20 * 16  # of 4 images, 8 captions, 5 tokens, 20 patches, 16 dimensions
    assert [flops(threshold) / product for threshold in (1.0, 0.5)] == [1, 6]
    # All scores come before any gradient: which patch was the highest is remembered, weights are computed again.
    assert [flops(threshold, direction="both") / product for threshold in (1.0, 0.5)] == [1, 8]


@pytest.fixture
def as_on_a_device() -> Iterator[None]:
    """A threshold of 1 is computed as where asking the device would wait."""
    by_image = highest_patch_by_image.highest_patch_loss_and_gradients
    with mock.patch.object(highest_patch, "highest_patch_loss_and_gradients", by_image):
        yield


@pytest.mark.usefixtures("as_on_a_device")
@given(
    batches(),
    st.integers(1, 8),
    st.sampled_from(DIRECTIONS),
    st.sampled_from(REDUCTIONS),
    st.sampled_from([1, 2**11, 2**30]),
    st.sampled_from([1.0, 0.3]),
)
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_without_asking_whether_patches_tie_value_and_gradient_are_the_same(
    batch: Batch, negatives: int, direction: str, reduction: str, chunk_bytes: int, weight: float
) -> None:
    batch = batch.but(threshold=1.0, alignment="sparse", reduction=reduction)
    assume(not _different_patches_tie(batch))
    options = {"image_negatives": negatives, "direction": direction}
    expected = loss_and_gradients(functional, batch, weight, **options)
    assert_same(loss_and_gradients(fused, batch, weight, **options, chunk_bytes=chunk_bytes), expected, 1e-9)


def _different_patches_tie(batch: Batch) -> bool:
    """Whether a token has two highest patches that differ: there the loss has a step."""
    similarity = torch.einsum("ild,jpd->iljp", batch.token_features, batch.patch_features)
    ends = similarity.aminmax(dim=-1, keepdim=True)
    return ((similarity > ends.max - 1e-9 * (1 + ends.max - ends.min)).sum(dim=-1) > 1).any().item()


@pytest.mark.usefixtures("as_on_a_device")
def test_without_asking_patches_that_are_equal_share_the_weight() -> None:
    batch = random_batch([4, 2, 3], 6, 4, 5).but(threshold=1.0)
    batch.patch_features[1, 3] = batch.patch_features[1, 0] = 9 * batch.token_features[1, 0]
    options = {"image_negatives": 2, "direction": "both"}
    assert_same(loss_and_gradients(fused, batch, **options), loss_and_gradients(functional, batch, **options), 1e-10)


@pytest.mark.usefixtures("as_on_a_device")
def test_without_asking_four_products_are_left_of_eight() -> None:
    batch = random_batch([5] * 8, 20, 5, 16, torch.float32).but(threshold=1.0)
    with FlopCounterMode(display=False) as counter:
        loss_and_gradients(fused, batch, image_negatives=3, direction="both")
    assert counter.get_total_flops() == 4 * 2 * 4 * 8 * 5 * 20 * 16


# The choice in SparcLoss


@pytest.mark.parametrize(("implementation", "taken"), [("auto", 2), ("fused", 2), ("eager", 0)])
def test_sparc_loss_takes_one_implementation_for_both_its_terms(implementation: str, taken: int) -> None:
    batch = random_batch([4, 2, 0], 6, 4, 5).with_gradients()
    outputs = {name: getattr(batch, name) for name in ("patch_features", "token_features", "token_mask")}
    unit = torch.nn.functional.normalize(torch.randn(2, 3, 5), dim=-1)
    loss = SparcLoss(implementation=implementation, image_negatives=2)
    total = loss(image_features=unit[0], text_features=unit[1], logit_scale=torch.tensor(10.0), **outputs)
    nodes, names = [total.grad_fn], []
    while nodes:
        node = nodes.pop()
        names.append(node.name())
        nodes += [each for each, _ in node.next_functions if each is not None]
    assert names.count("_FusedLossBackward") == taken


def test_a_compiled_caller_breaks_its_graph_and_goes_on() -> None:
    torch.compiler.reset()
    batch = random_batch([4, 2, 3], 6, 4, 5)

    def doubled(patch_features: Tensor) -> Tensor:
        changed = batch.but(patch_features=patch_features)
        return 2 * fused.image_contrastive_loss(**vars(changed), image_negatives=2)

    compiled = torch.compile(doubled, backend="eager")
    assert_close(compiled(batch.patch_features), doubled(batch.patch_features))


def test_a_chunk_of_no_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk_bytes is 0; expected a number of at least 1"):
        fused.image_contrastive_loss(**vars(random_batch([2, 2], 6, 4, 5)), image_negatives=1, chunk_bytes=0)


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
