"""The objective, equation by equation: golden vectors, a slow reference, and what must hold for every input."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from implementations import IMPLEMENTATIONS
from strategies import Batch, batches
from torch import Tensor
from torch.testing import assert_close

from sparc_loss._masks import valid_tokens
from sparc_loss.functional import (
    ALIGNMENTS,
    REDUCTIONS,
    alignment_weights,
    fine_grained_loss,
    language_grouped_embeddings,
    sequence_contrastive_loss,
    token_patch_similarity,
)

PRECISIONS = [
    pytest.param(torch.float64, 1e-9, id="float64"),
    pytest.param(torch.float32, 1e-5, id="float32"),
]
LOW_PRECISIONS = [torch.bfloat16, torch.float16]


def close(actual: Tensor, expected: Tensor | float, tolerance: float = 1e-9) -> None:
    assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


def similarities(*rows: list[float]) -> Tensor:
    """One image, one token per row."""
    return torch.tensor([rows], dtype=torch.float64)


# Golden vectors


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_golden_alignment(golden: SimpleNamespace, dtype: torch.dtype, tolerance: float) -> None:
    similarity = token_patch_similarity(golden.token_features.to(dtype), golden.patch_features.to(dtype))
    weights = alignment_weights(similarity, golden.threshold, golden.method)
    assert weights.dtype == dtype
    close(weights, golden.alignment, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_golden_loss_and_gradients(golden: SimpleNamespace, dtype: torch.dtype, tolerance: float) -> None:
    patch_features = golden.patch_features.to(dtype).requires_grad_()
    token_features = golden.token_features.to(dtype).requires_grad_()
    loss = fine_grained_loss(
        patch_features,
        token_features,
        golden.token_mask,
        golden.logit_scale,
        threshold=golden.threshold,
        alignment=golden.method,
        reduction=golden.reduction,
    )
    loss.backward()
    assert loss.dtype == dtype
    assert_close(loss.item(), golden.fine_grained, rtol=tolerance, atol=1e-9)
    if hasattr(golden, "grad_patch"):
        for gradient, expected in ((patch_features.grad, golden.grad_patch), (token_features.grad, golden.grad_token)):
            # Relative to the largest: sums of terms that cancel keep no more digits than that. The golden gradients
            # are central differences, good to 1e-9.
            atol = max(tolerance * expected.abs().max().item(), 1e-9)
            assert_close(gradient, expected.to(dtype), rtol=0, atol=atol)


# The slow reference


def test_the_reference_itself_on_a_case_worked_by_hand() -> None:
    """Two tokens, two patches: each token finds its own patch, so the loss is softplus(-scale) per token."""
    eye = np.eye(2)[None]
    result = reference.fine_grained(eye, eye, np.ones((1, 2), dtype=bool), logit_scale=3.0)
    assert result.alignment.tolist() == eye.tolist()
    assert result.loss == pytest.approx(np.log1p(np.exp(-3.0)))


@given(batches())
@settings(max_examples=150)
def test_equals_the_slow_reference(batch: Batch) -> None:
    arguments = {name: value.numpy() if isinstance(value, Tensor) else value for name, value in vars(batch).items()}
    expected = reference.fine_grained(**arguments)
    close(batch.weights(), expected.alignment, 1e-10)
    close(batch.loss(), expected.loss, 1e-10)


# Eq. 2: similarity


def test_similarity_is_the_inner_product_of_each_token_with_each_patch_of_its_own_image() -> None:
    tokens = torch.tensor([[[1.0, 2.0]], [[1.0, 0.0]]])
    patches = torch.tensor([[[3.0, 4.0], [5.0, 6.0]], [[7.0, 8.0], [9.0, 0.0]]])
    assert token_patch_similarity(tokens, patches).tolist() == [[[11.0, 17.0]], [[7.0, 9.0]]]


# Eqs. 2 to 4: alignment weights


def test_weights_are_min_max_normalised_similarities_over_their_sum() -> None:
    weights = alignment_weights(similarities([0.0, 1.0, 3.0, 4.0]), alignment="dense")
    close(weights, [[[0, 1 / 8, 3 / 8, 4 / 8]]])


def test_sparse_drops_what_is_below_one_over_the_number_of_patches() -> None:
    weights = alignment_weights(similarities([0.0, 0.9, 2.0, 4.0]))
    close(weights, [[[0, 0, 2 / 6, 4 / 6]]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_similarity_right_at_the_threshold_is_kept(dtype: torch.dtype) -> None:
    # 1/3 after normalisation, and P = 3.
    weights = alignment_weights(similarities([0.0, 1.0, 3.0]).to(dtype))
    close(weights, [[[0, 1 / 4, 3 / 4]]], 1e-6)


@given(batches(alignment="sparse", threshold=0.0))
def test_threshold_zero_equals_dense(batch: Batch) -> None:
    close(batch.weights(), batch.but(alignment="dense").weights())


@given(batches(alignment="sparse", threshold=1.0, masks=False))
def test_threshold_one_keeps_the_most_similar_patches_only(batch: Batch) -> None:
    similarity = token_patch_similarity(batch.token_features, batch.patch_features)
    best = (similarity == similarity.amax(dim=-1, keepdim=True)).double()
    close(batch.weights(), best / best.sum(dim=-1, keepdim=True))


def test_softmax_is_over_patches() -> None:
    similarity = torch.randn(2, 3, 4, dtype=torch.float64)
    exponentials = similarity.exp()
    close(alignment_weights(similarity, alignment="softmax"), exponentials / exponentials.sum(dim=2, keepdim=True))


@given(batches())
def test_rows_are_non_negative_and_sum_to_one_or_to_zero_without_a_usable_patch(batch: Batch) -> None:
    weights = batch.weights()
    everything = torch.ones_like(batch.token_mask)
    has_patch = valid_tokens(
        batch.token_features, batch.patch_features, everything, batch.patch_mask, batch.region_mask
    )
    assert (weights >= 0).all()
    close(weights.sum(dim=-1), has_patch.double())


@pytest.mark.parametrize("method", ALIGNMENTS)
def test_equal_similarities_give_uniform_weights_and_no_gradient(method: str) -> None:
    similarity = torch.full((1, 2, 5), 0.7, requires_grad=True)
    weights = alignment_weights(similarity, alignment=method)
    close(weights, torch.full((1, 2, 5), 1 / 5), 1e-6)
    weights[..., 0].sum().backward()
    if method != "softmax":
        assert (similarity.grad == 0).all()
    assert similarity.grad.isfinite().all()


@pytest.mark.parametrize("method", ALIGNMENTS)
def test_a_single_patch_gets_all_the_weight(method: str) -> None:
    assert (alignment_weights(torch.randn(2, 3, 1), alignment=method) == 1).all()


@pytest.mark.parametrize("method", ALIGNMENTS)
def test_excluded_patches_get_no_weight_and_no_gradient(method: str) -> None:
    similarity = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    region_mask = torch.rand(2, 3, 6) < 0.6
    patch_mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    usable = region_mask & patch_mask[:, None]
    weights = alignment_weights(similarity, None, method, patch_mask, region_mask)
    (weights * torch.randn_like(weights)).sum().backward()
    assert (weights[~usable] == 0).all()
    assert (similarity.grad[~usable] == 0).all()
    assert similarity.grad.isfinite().all()


def test_patches_that_are_masked_do_not_count_in_the_default_threshold() -> None:
    # 0.3 after normalisation is above 1/5, all patches, but below 1/3, those that count.
    similarity = similarities([0.0, 0.3, 1.0, -9.0, 9.0])
    usable = torch.tensor([[True, True, True, False, False]])
    close(alignment_weights(similarity, patch_mask=usable), [[[0, 0, 1, 0, 0]]])
    close(alignment_weights(similarity, region_mask=usable[:, None]), [[[0, 0, 1, 0, 0]]])


@pytest.mark.parametrize("method", ALIGNMENTS)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_a_token_that_may_use_no_patch_has_zero_weights_and_no_nan_anywhere_in_its_gradient(method: str) -> None:
    similarity = torch.randn(1, 2, 3, requires_grad=True)
    region_mask = torch.tensor([[[True, True, True], [False, False, False]]])
    with torch.autograd.detect_anomaly():  # also of NaN in between that a mask hides at the end
        weights = alignment_weights(similarity, alignment=method, region_mask=region_mask)
        weights.square().sum().backward()
    assert weights[0, 1].tolist() == [0, 0, 0]
    assert similarity.grad.isfinite().all()


# Eq. 5: grouping


def test_grouped_embeddings_are_weighted_sums_of_patches() -> None:
    weights = torch.tensor([[[0.25, 0.75]]])
    patches = torch.tensor([[[4.0, 0.0], [0.0, 8.0]]])
    assert language_grouped_embeddings(weights, patches).tolist() == [[[1.0, 6.0]]]


# Eq. 6: contrast within a pair


def test_contrast_is_the_mean_of_both_cross_entropies_within_a_caption() -> None:
    grouped, tokens = torch.randn(2, 1, 4, 5, dtype=torch.float64)
    cosine = torch.nn.functional.cosine_similarity(grouped[0][:, None], tokens[0][None], dim=-1)
    target = torch.arange(4)
    both = [torch.nn.functional.cross_entropy(10 * logits, target) for logits in (cosine, cosine.T)]
    loss = sequence_contrastive_loss(grouped, tokens, torch.ones(1, 4, dtype=torch.bool), 10.0)
    close(loss, sum(both) / 2)


def test_token_reduction_is_the_mean_over_all_tokens_and_sample_reduction_over_captions() -> None:
    batch = lengths_batch([1, 4, 0])
    one, four = (lengths_batch([1, 4, 0]).but(**sample(batch, index)).loss() for index in (0, 1))
    close(batch.loss(), (one + 4 * four) / 5)
    close(batch.but(reduction="sample").loss(), (one + four) / 3)


# The whole loss (what must hold of it for every input: test_invariants.py, test_degenerate.py)


def test_a_token_that_may_use_no_patch_does_not_count() -> None:
    batch = lengths_batch([4])
    region_mask = torch.ones(1, 4, 6, dtype=torch.bool)
    region_mask[0, 2] = False
    without = batch.token_mask.clone()
    without[0, 2] = False
    close(batch.but(region_mask=region_mask).loss(), batch.but(token_mask=without).loss())


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_first_and_second_derivatives(alignment: str, reduction: str) -> None:
    batch = lengths_batch([3, 2, 0]).but(alignment=alignment, reduction=reduction, threshold=0.3)
    region_mask = torch.rand(3, 4, 6) < 0.8
    region_mask[0, 1] = False
    scale = torch.tensor(5.0, dtype=torch.float64)

    def loss(patch_features: Tensor, token_features: Tensor, logit_scale: Tensor) -> Tensor:
        changed = batch.but(patch_features=patch_features, token_features=token_features, logit_scale=logit_scale)
        return changed.but(region_mask=region_mask).loss()

    inputs = [tensor.clone().requires_grad_() for tensor in (batch.patch_features, batch.token_features, scale)]
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("zero", ["patch_features", "token_features"])
def test_zero_features_give_finite_second_derivatives(zero: str) -> None:
    batch = lengths_batch([3, 2])
    getattr(batch, zero)[0] = 0
    batch = batch.with_gradients()
    features = batch.patch_features, batch.token_features
    first = torch.autograd.grad(batch.loss(), features, create_graph=True)
    second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), features)
    assert all(gradient.isfinite().all() for gradient in second)


def test_the_scale_may_be_a_number_or_a_tensor_of_one_element() -> None:
    batch = lengths_batch([3, 2])
    for scale in (torch.tensor(10.0), torch.tensor([10.0])):
        assert torch.equal(batch.but(logit_scale=scale).loss(), batch.loss())


def test_the_scale_does_not_change_the_dtype_of_the_loss() -> None:
    assert float32_batch().but(logit_scale=torch.tensor([10.0], dtype=torch.float64)).loss().dtype == torch.float32


# Precision (of the whole loss: test_precision.py)


def test_autocast_changes_no_weight() -> None:
    batch = float32_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = batch.weights()
    assert weights.dtype == torch.float32
    assert torch.equal(weights, batch.weights())


@pytest.mark.parametrize("dtype", LOW_PRECISIONS)
def test_every_function_returns_float32_for_low_precision(dtype: torch.dtype) -> None:
    patches, tokens = torch.randn(2, 5, 4, dtype=dtype), torch.randn(2, 3, 4, dtype=dtype)
    similarity = token_patch_similarity(tokens, patches)
    weights = alignment_weights(similarity.to(dtype))
    grouped = language_grouped_embeddings(weights.to(dtype), patches)
    loss = sequence_contrastive_loss(grouped.to(dtype), tokens, torch.ones(2, 3, dtype=torch.bool), 10.0)
    assert {similarity.dtype, weights.dtype, grouped.dtype, loss.dtype} == {torch.float32}


# Bad input


PATCHES, TOKENS, MASK = torch.zeros(2, 5, 4), torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)

REFUSED = [
    ({"patch_features": [[0.0]]}, TypeError, "patch_features is a list; expected a tensor [B, P, D]"),
    ({"patch_features": PATCHES[0]}, ValueError, "patch_features has shape [5, 4]; expected rank 3, [B, P, D]"),
    (
        {"patch_features": PATCHES[:, :0]},
        ValueError,
        f"patch_features has P = 0 in shape {[len(PATCHES), 0, 4]}; expected at least 1",
    ),
    (
        {"token_features": TOKENS.long()},
        TypeError,
        "token_features has dtype torch.int64; expected a floating-point tensor [B, L, D]",
    ),
    (
        {"token_features": TOKENS[:1]},
        ValueError,
        "token_features has B = 1 in shape [1, 3, 4], patch_features has B = 2; expected the same",
    ),
    (
        {"token_features": TOKENS[..., :3]},
        ValueError,
        "token_features has D = 3 in shape [2, 3, 3], patch_features has D = 4; expected the same",
    ),
    (
        {"token_features": TOKENS.to("meta")},
        ValueError,
        "token_features is on meta and patch_features on cpu; expected one device",
    ),
    (
        {"token_mask": None},
        TypeError,
        "token_mask is a NoneType; expected a bool tensor [B, L] = [2, 3]",
    ),
    (
        {"token_mask": MASK.float()},
        TypeError,
        "token_mask has dtype torch.float32; expected torch.bool, True where valid",
    ),
    ({"token_mask": MASK[:, :2]}, ValueError, "token_mask has shape [2, 2]; expected [B, L] = [2, 3]"),
    (
        {"token_mask": MASK.to("meta")},
        ValueError,
        "token_mask is on meta and the features on cpu; expected one device",
    ),
    ({"patch_mask": MASK}, ValueError, "patch_mask has shape [2, 3]; expected [B, P] = [2, 5]"),
    ({"patch_mask": PATCHES[..., 0]}, TypeError, "patch_mask has dtype torch.float32; expected torch.bool"),
    ({"region_mask": MASK}, ValueError, "region_mask has shape [2, 3]; expected [B, L, P] = [2, 3, 5]"),
    ({"threshold": 1.5}, ValueError, "threshold is 1.5; expected a number between 0 and 1"),
    ({"threshold": -0.1}, ValueError, "threshold is -0.1; expected a number between 0 and 1"),
    ({"threshold": float("nan")}, ValueError, "threshold is nan; expected a finite number between 0 and 1"),
    ({"threshold": "1/P"}, TypeError, "threshold is '1/P' (str); expected a number"),
    ({"threshold": True}, TypeError, "threshold is True (bool); expected a number"),
    ({"alignment": "max"}, ValueError, "alignment is 'max'; expected one of 'sparse', 'dense', 'softmax'"),
    ({"reduction": "mean"}, ValueError, "reduction is 'mean'; expected one of 'token', 'sample'"),
    ({"logit_scale": torch.ones(3)}, ValueError, "logit_scale has shape [3]; expected one element, 1/tau"),
]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("changed", "error", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_bad_input_is_refused_by_name(name: str, changed: dict, error: type[Exception], message: str) -> None:
    arguments = {"patch_features": PATCHES, "token_features": TOKENS, "token_mask": MASK, "logit_scale": 1.0}
    with pytest.raises(error, match=re.escape(message)):
        IMPLEMENTATIONS[name](**arguments | changed)


def test_similarities_without_a_patch_are_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("similarity has P = 0 in shape [2, 3, 0]; expected at least 1")):
        alignment_weights(torch.zeros(2, 3, 0))


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="alignment is 'hard'; expected one of 'sparse', 'dense', 'softmax'"):
        alignment_weights(torch.zeros(2, 3, 5), alignment="hard")


def test_weights_and_patches_that_disagree_are_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("patch_features has P = 5 in shape [2, 5, 4], weights has P = 6")):
        language_grouped_embeddings(torch.zeros(2, 3, 6), PATCHES)


def test_groups_and_tokens_that_disagree_are_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("token_features has L = 3 in shape [2, 3, 4], grouped has L = 2")):
        sequence_contrastive_loss(TOKENS[:, :2], TOKENS, MASK, 1.0)


def lengths_batch(lengths: list[int]) -> Batch:
    """Random float64 features, 6 patches, up to 4 tokens: caption b has lengths[b] tokens."""
    generator = torch.Generator().manual_seed(3)
    b = len(lengths)
    return Batch(
        patch_features=torch.randn(b, 6, 5, generator=generator, dtype=torch.float64),
        token_features=torch.randn(b, 4, 5, generator=generator, dtype=torch.float64),
        token_mask=torch.arange(4) < torch.tensor(lengths)[:, None],
        logit_scale=10.0,
    )


def float32_batch() -> Batch:
    batch = lengths_batch([4, 2])
    return batch.but(patch_features=batch.patch_features.float(), token_features=batch.token_features.float())


def sample(batch: Batch, index: int) -> dict[str, Tensor]:
    """The tensors of one pair of the batch, as a batch of one."""
    return {name: value[index : index + 1] for name, value in vars(batch).items() if isinstance(value, Tensor)}
