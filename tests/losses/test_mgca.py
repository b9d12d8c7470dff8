"""MgcaLoss and MgcaHeads: token alignment by cross-attention, and prototype alignment."""

import re

import baseline_reference
import pytest
import torch
from baseline_outputs import FEATURES, assert_same_value_and_gradient, baseline_outputs, random_outputs
from hypothesis import given
from torch.testing import assert_close

from sparc_loss.losses import MgcaHeads, MgcaLoss
from sparc_loss.losses.mgca import sinkhorn


def heads_for(outputs, head_dim=3, prototypes=4):
    return MgcaHeads(outputs["patch_features"].shape[-1], head_dim, prototypes).double()


def matrices(attention):
    return {name: getattr(attention, name).weight for name in ("query", "key", "value", "output")}


def term(name, outputs, heads):
    return MgcaLoss()(**outputs, **heads(**outputs), output_dict=True)[name]


@given(baseline_outputs())
def test_token_alignment_is_the_slow_references_in_value_and_gradient(outputs):
    heads = heads_for(outputs)
    to_patches, to_tokens = matrices(heads.tokens_to_patches), matrices(heads.patches_to_tokens)
    assert_same_value_and_gradient(
        lambda outputs: term("fine_grained_loss", outputs, heads),
        lambda outputs: baseline_reference.mgca_tokens(outputs, to_patches, to_tokens),
        outputs,
    )


@given(baseline_outputs())
def test_prototype_alignment_is_the_slow_references_in_value_and_gradient(outputs):
    heads = heads_for(outputs)
    assert_same_value_and_gradient(
        lambda outputs: term("prototype_loss", outputs, heads),
        lambda outputs: baseline_reference.mgca_prototypes(outputs, heads.prototypes),
        outputs,
    )


def test_the_heads_gradients_are_the_slow_references():
    outputs = random_outputs()
    heads = heads_for(outputs)
    loss = MgcaLoss(global_weight=0)(**outputs, **heads(**outputs))
    to_patches, to_tokens = matrices(heads.tokens_to_patches), matrices(heads.patches_to_tokens)
    expected = baseline_reference.mgca_tokens(outputs, to_patches, to_tokens)
    expected = expected + baseline_reference.mgca_prototypes(outputs, heads.prototypes)
    assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    parameters = list(heads.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    assert all(gradient.any() for gradient in gradients)
    assert_close(gradients, torch.autograd.grad(expected, parameters), rtol=1e-9, atol=1e-9)


def test_three_terms_weigh_the_same_by_default_and_sum_to_the_loss():
    outputs = random_outputs()
    heads = heads_for(outputs)
    further = heads(**outputs)
    terms = MgcaLoss()(**outputs, **further, output_dict=True)
    assert list(terms) == ["contrastive_loss", "fine_grained_loss", "prototype_loss"]
    assert torch.equal(MgcaLoss()(**outputs, **further), sum(terms.values()))
    doubled = MgcaLoss(2, 2, 2)(**outputs, **further, output_dict=True)
    for name, value in terms.items():
        assert_close(doubled[name], 2 * value)


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)], ids=str)
def test_whatever_the_weights_every_parameter_of_the_heads_gets_a_gradient(weights):
    """DistributedDataParallel waits for the gradient of every parameter."""
    outputs = random_outputs()
    heads = heads_for(outputs)
    MgcaLoss(*weights)(**outputs, **heads(**outputs)).backward()
    assert all(parameter.grad is not None for parameter in heads.parameters())


def test_a_batch_without_tokens_still_gives_every_parameter_of_the_heads_a_gradient():
    outputs = random_outputs()
    outputs["token_mask"] = torch.zeros_like(outputs["token_mask"])
    heads = heads_for(outputs)
    MgcaLoss()(**outputs, **heads(**outputs)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in heads.parameters())


def test_sinkhorn_gives_every_sample_a_total_of_one_and_step_by_step_every_prototype_the_same():
    logits = torch.rand(12, 4).double() * 2 - 1
    assignments = [sinkhorn(logits, 0.5, steps) for steps in (1, 3, 30)]
    for assignment in assignments:
        assert_close(assignment.sum(dim=1), torch.ones(12).double())
    one, three, thirty = ((assignment.sum(dim=0) - 3).abs().max() for assignment in assignments)
    assert one > three > 1e-6 > thirty


def test_sinkhorn_stays_finite_at_any_epsilon():
    assert sinkhorn(torch.rand(5, 3) * 2 - 1, 1e-6, 3).isfinite().all()


def test_prototypes_count_by_their_direction_only():
    outputs = random_outputs()
    heads = heads_for(outputs)
    expected = term("prototype_loss", outputs, heads)
    with torch.no_grad():
        heads.prototypes *= 7
    assert_close(term("prototype_loss", outputs, heads), expected)


def test_the_heads_compute_in_float32_under_autocast_and_with_low_precision_features():
    outputs = random_outputs(dtype=torch.float32)
    heads = MgcaHeads(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(heads(**outputs), MgcaHeads.forward(heads, **outputs), rtol=0, atol=0)
        assert all(value.dtype == torch.float32 for value in heads(**outputs).values())
    low = {name: value.bfloat16() if name in FEATURES[:4] else value for name, value in outputs.items()}
    assert all(value.dtype == torch.float32 for value in heads(**low).values())


def test_the_defaults_are_the_papers():
    heads = MgcaHeads(6)
    assert heads.prototypes.shape == (500, 6)
    assert heads.tokens_to_patches.query.weight.shape == (128, 6)
    assert (MgcaLoss().sinkhorn_epsilon, MgcaLoss().sinkhorn_steps) == (0.05, 3)


def test_without_the_heads_outputs_the_error_says_what_is_missing():
    message = (
        "MgcaLoss got no attended_patches, attended_tokens, image_prototype_logits, text_prototype_logits; expected"
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        MgcaLoss()(**random_outputs())


@pytest.mark.parametrize("size", ["head_dim", "prototypes"])
def test_sizes_of_the_heads_that_are_no_sizes_are_refused_by_name(size):
    with pytest.raises(ValueError, match=f"{size} is 0; expected a whole number of at least 1"):
        MgcaHeads(6, **{size: 0})
    with pytest.raises(TypeError, match=f"{size} is 8.0"):
        MgcaHeads(6, **{size: 8.0})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("attended_patches", "attended_patches has D = 3 in shape"),
        ("attended_tokens", "attended_tokens has D = 3 in shape"),
    ],
)
def test_outputs_of_other_heads_are_refused_by_name(name, message):
    outputs = random_outputs()
    further = MgcaHeads(6).double()(**outputs)
    further[name] = further[name][..., :3]
    with pytest.raises(ValueError, match=re.escape(message)):
        MgcaLoss(global_weight=0)(**outputs, **further)


def test_prototypes_of_another_batch_are_refused_by_name():
    outputs = random_outputs()
    further = MgcaHeads(6).double()(**outputs)
    logits = {name: further[name][:2] for name in ("image_prototype_logits", "text_prototype_logits")}
    with pytest.raises(ValueError, match="image_prototype_logits has B = 2 in shape"):
        MgcaLoss(global_weight=0)(**outputs, **{**further, **logits})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prototype_weight": -1}, "prototype_weight is -1; expected a number of at least 0"),
        ({"prototype_scale": 0}, "prototype_scale is 0; expected a number above 0"),
        ({"sinkhorn_epsilon": 0}, "sinkhorn_epsilon is 0; expected a number above 0"),
        ({"sinkhorn_steps": 0}, "sinkhorn_steps is 0; expected a whole number of at least 1"),
        ({"sinkhorn_steps": 2.5}, "sinkhorn_steps is 2.5 (float); expected a whole number"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name(options, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        MgcaLoss(**options)
