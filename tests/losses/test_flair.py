"""FlairLoss and FlairHeads: a sigmoid loss on patches that learned attention pools for each caption."""

import re

import baseline_reference
import pytest
import torch
from baseline_outputs import FEATURES, assert_same_value_and_gradient, baseline_outputs, random_outputs
from hypothesis import given
from largest_tensor import LargestTensor
from torch.nn import functional as F
from torch.testing import assert_close

from sparc_loss.losses import FlairHeads, FlairLoss, all_pairs


def heads_for(outputs, heads=1):
    made = FlairHeads(outputs["patch_features"].shape[-1], heads, bias=-1.0).double()
    with torch.no_grad():  # at first these are 0
        made.attn.in_proj_bias.normal_()
        made.attn.out_proj.bias.normal_()
    return made


def weights(heads):
    return dict(heads.named_parameters())


def term(outputs, heads):
    return FlairLoss(fine_grained_weight=1)(**outputs, **heads(**outputs), output_dict=True)["fine_grained_loss"]


@given(baseline_outputs())
def test_is_the_slow_reference_in_value_and_gradient(outputs):
    size = outputs["patch_features"].shape[-1]
    number = 2 if size % 2 == 0 else 1
    heads = heads_for(outputs, number)
    assert_same_value_and_gradient(
        lambda outputs: term(outputs, heads),
        lambda outputs: baseline_reference.flair(outputs, weights(heads), number),
        outputs,
    )


def test_the_heads_gradients_are_the_slow_references():
    outputs = random_outputs()
    heads = heads_for(outputs, 3)
    parameters = {name: each for name, each in weights(heads).items() if not name.startswith("ln_")}
    loss, expected = term(outputs, heads), baseline_reference.flair(outputs, weights(heads), 3)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    assert all(gradient.any() for gradient in gradients)
    assert_close(gradients, torch.autograd.grad(expected, list(parameters.values())), rtol=1e-9, atol=1e-9)


def test_the_attention_is_that_of_torchs_module_with_a_zero_patch():
    """As FLAIR's code calls it: every image is attended by all captions."""
    outputs = random_outputs()
    heads = heads_for(outputs, 2)
    with torch.no_grad():
        for norm in (heads.ln_q, heads.ln_k, heads.ln_v):
            norm.weight.normal_()
            norm.bias.normal_()
    patches, texts = outputs["patch_features"], F.normalize(outputs["text_features"], dim=-1)
    queries = heads.ln_q(texts).expand(len(patches), -1, -1)
    pooled, _ = heads.attn(queries, heads.ln_k(patches), heads.ln_v(patches), need_weights=False)
    expected = F.cosine_similarity(pooled, texts.expand_as(pooled), dim=-1)
    assert_close(heads(**outputs)["text_conditioned_cosines"], expected)


def test_does_not_depend_on_the_size_of_the_blocks(monkeypatch):
    outputs = random_outputs()
    heads = heads_for(outputs)
    expected = term(outputs, heads)
    inputs = [outputs["patch_features"], outputs["text_features"], *heads.parameters()]
    gradients = torch.autograd.grad(expected, inputs)
    monkeypatch.setattr(all_pairs, "BLOCK_NUMBERS", 1)
    assert_close(term(outputs, heads), expected)
    assert_close(torch.autograd.grad(term(outputs, heads), inputs), gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_heads_compute_in_the_dtype_of_their_parameters(dtype):
    heads = FlairHeads(6, heads=2).to(dtype)
    outputs = random_outputs()
    inputs = {name: outputs[name].to(dtype) for name in ("text_features", "patch_features", "token_features")}
    cosines = heads(**inputs, token_mask=outputs["token_mask"])["text_conditioned_cosines"]
    expected = heads.double()(**outputs)["text_conditioned_cosines"]
    assert_close(cosines, expected, rtol=0.05, atol=0.05, check_dtype=False)


def test_no_tensor_of_a_block_is_larger_than_the_bound(monkeypatch):
    monkeypatch.setattr(all_pairs, "BLOCK_NUMBERS", 4096)
    generator = torch.Generator().manual_seed(0)
    texts, patches = torch.randn(64, 8, generator=generator), torch.randn(4, 30, 8, generator=generator)
    heads = FlairHeads(8, heads=8)
    with LargestTensor() as largest:
        heads(texts[:4], patches, texts[:4, None], torch.ones(4, 1, dtype=torch.bool))
    assert largest.elements <= 4096


def test_an_image_without_a_patch_adds_nothing():
    outputs = random_outputs()
    outputs["patch_mask"] = torch.ones(outputs["patch_features"].shape[:2], dtype=torch.bool)
    outputs["patch_mask"][1] = False
    heads = heads_for(outputs)
    loss = term(outputs, heads)
    assert_close(loss, baseline_reference.flair(outputs, weights(heads), 1))
    (gradient,) = torch.autograd.grad(loss, outputs["patch_features"])
    assert (gradient[1] == 0).all()


def test_a_caption_without_tokens_still_has_its_embedding():
    outputs = random_outputs()
    heads = heads_for(outputs)
    expected = term(outputs, heads)
    outputs["token_mask"] = torch.zeros_like(outputs["token_mask"])
    assert_close(term(outputs, heads), expected)


@pytest.mark.parametrize("weight", [0, 1])
def test_whatever_the_weight_every_parameter_of_the_heads_gets_a_gradient(weight):
    """DistributedDataParallel waits for the gradient of every parameter."""
    outputs = random_outputs()
    heads = heads_for(outputs)
    FlairLoss(fine_grained_weight=weight)(**outputs, **heads(**outputs)).backward()
    assert all(parameter.grad is not None for parameter in heads.parameters())


def test_the_heads_compute_in_float32_under_autocast_and_with_low_precision_features():
    outputs = random_outputs(dtype=torch.float32)
    heads = FlairHeads(6, heads=2)
    expected = heads(**outputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(heads(**outputs), expected, rtol=0, atol=0)
    low = {name: value.bfloat16() if name in FEATURES[:4] else value for name, value in outputs.items()}
    assert all(value.dtype == torch.float32 for value in heads(**low).values())


def test_the_defaults_are_the_authors():
    loss, heads = FlairLoss(), FlairHeads(16)
    assert (loss.global_weight, loss.fine_grained_weight) == (0.5, 0.5)
    assert (heads.attn.num_heads, heads.bias.item()) == (8, -10)
    names = {"attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias"}
    names |= {f"ln_{each}.{kind}" for each in "qkv" for kind in ("weight", "bias")}
    assert weights(heads).keys() == {"bias", *names}  # as in their visual_proj


def test_without_the_heads_outputs_the_error_says_what_is_missing():
    with pytest.raises(TypeError, match="FlairLoss got no text_conditioned_cosines, text_conditioned_bias; expected"):
        FlairLoss()(**random_outputs())


def test_heads_of_another_number_of_ranks_are_refused():
    outputs = random_outputs()
    further = heads_for(outputs)(**outputs)
    loss = FlairLoss(global_weight=0, gather_with_grad=True, world_size=2)
    message = "text_conditioned_cosines has shape [3, 3]; expected [3, 6], the captions of 2 rank(s): FlairHeads and"
    with pytest.raises(ValueError, match=re.escape(message)):
        loss(**outputs, **further)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, "heads is 0; expected a whole number of at least 1"),
        ({"heads": 4}, "heads is 4 with embed_dim 6; expected a divisor of embed_dim"),
    ],
    ids=str,
)
def test_bad_settings_of_the_heads_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        FlairHeads(6, **options)
