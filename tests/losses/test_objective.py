"""What every objective promises; its formula is in a file of its own."""

import re
from unittest import mock

import pytest
import torch
from baseline_outputs import FEATURES, random_outputs
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, nn
from torch.testing import assert_close

from sparc_loss.losses import FilipLoss, FlairHeads, FlairLoss, GloriaLoss, MgcaHeads, MgcaLoss, PaclLoss, SparcLoss

B, P, L, D = 3, 4, 5, 6
LOSSES = [FilipLoss, PaclLoss, GloriaLoss, MgcaLoss, FlairLoss]
HEADS = {
    MgcaLoss: lambda dim: MgcaHeads(dim, head_dim=3, prototypes=4),
    FlairLoss: lambda dim: FlairHeads(dim, heads=1),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test runs for each baseline, and for SparcLoss too where it asks for `any_loss_class`."""
    if "any_loss_class" in metafunc.fixturenames:
        metafunc.parametrize("any_loss_class", [SparcLoss, *LOSSES])
    else:
        metafunc.parametrize("loss_class", LOSSES)


def total(loss_class, outputs: dict[str, Tensor], output_dict: bool = False, **options):
    """The loss in evaluation mode, without dropped tokens."""
    return loss_class(**options).eval()(**with_heads(loss_class, outputs), output_dict=output_dict)


def with_heads(loss_class, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """For MGCA and FLAIR, also the outputs of heads of fixed weights."""
    if loss_class not in HEADS:
        return outputs
    with torch.random.fork_rng():
        torch.manual_seed(1)
        heads = HEADS[loss_class](outputs["patch_features"].shape[-1])
    heads.to(max((torch.float32, outputs["patch_features"].dtype), key=lambda dtype: dtype.itemsize))
    features = {name: value for name, value in outputs.items() if name not in ("logit_bias", "region_mask")}
    return {**outputs, **heads(**features)}


def test_is_the_weighted_sum_of_the_global_loss_and_the_others(any_loss_class):
    outputs = random_outputs()
    terms = total(any_loss_class, outputs, output_dict=True, global_weight=0.3, fine_grained_weight=2.0)
    alone = total(any_loss_class, outputs, output_dict=True, global_weight=0, fine_grained_weight=1.0)
    contrastive = ClipLoss()(outputs["image_features"], outputs["text_features"], outputs["logit_scale"])
    assert_close(terms["contrastive_loss"], 0.3 * contrastive)
    assert_close(terms["fine_grained_loss"], 2 * alone["fine_grained_loss"])
    assert all(name.endswith("_loss") for name in terms)
    whole = total(any_loss_class, outputs, global_weight=0.3, fine_grained_weight=2.0)
    assert whole.shape == ()
    assert torch.equal(whole, sum(terms.values()))


def test_a_fixed_scale_replaces_the_learned_one_in_the_fine_grained_term_only(any_loss_class):
    outputs = random_outputs()
    fixed = total(any_loss_class, outputs, output_dict=True, global_weight=1, fine_grained_scale=3.0)
    learned = total(any_loss_class, {**outputs, "logit_scale": torch.tensor(3.0).double()}, output_dict=True)
    contrastive = ClipLoss()(outputs["image_features"], outputs["text_features"], outputs["logit_scale"])
    assert_close(fixed["fine_grained_loss"], learned["fine_grained_loss"])
    assert_close(fixed["contrastive_loss"], contrastive)


class ReturnsATensor(nn.Module):
    def forward(self, output_dict, **outputs):
        return torch.zeros(())


def test_another_global_loss_gets_its_bias(any_loss_class):
    outputs = random_outputs()
    bias = torch.tensor(-10.0)
    terms = total(
        any_loss_class, {**outputs, "logit_bias": bias}, output_dict=True, global_weight=2, global_loss=SigLipLoss()
    )
    expected = SigLipLoss()(outputs["image_features"], outputs["text_features"], outputs["logit_scale"], bias)
    assert_close(terms["contrastive_loss"], 2 * expected)


def test_weights_of_zero_skip_the_work_and_leave_every_input_of_the_global_loss_a_gradient(any_loss_class):
    outputs = {**random_outputs(), "logit_bias": torch.tensor(-10.0, requires_grad=True)}
    refuses = mock.Mock(spec=nn.Module, side_effect=AssertionError("called"), gather_with_grad=True, world_size=1)
    with mock.patch.object(any_loss_class, "fine_grained_term", side_effect=AssertionError("called")):
        total(any_loss_class, outputs, global_weight=0, fine_grained_weight=0, global_loss=refuses).backward()
    for name in ("image_features", "text_features", "logit_scale", "logit_bias"):
        assert outputs[name].grad is not None


def test_what_the_masks_leave_out_changes_nothing(loss_class):
    outputs = random_outputs()
    outputs["patch_mask"] = torch.tensor([[True, True, False, True], [True] * 4, [False, True, False, False]])
    expected = total(loss_class, outputs)
    with torch.no_grad():
        outputs["patch_features"][~outputs["patch_mask"]] = 1e6
        outputs["token_features"][~outputs["token_mask"]] = -1e6
    assert_close(total(loss_class, outputs), expected, rtol=1e-12, atol=1e-12)
    inputs = [outputs["patch_features"], outputs["token_features"]]
    by_patch, by_token = torch.autograd.grad(total(loss_class, outputs), inputs, materialize_grads=True)
    assert (by_patch[~outputs["patch_mask"]] == 0).all()
    assert (by_token[~outputs["token_mask"]] == 0).all()


def test_the_order_of_the_pairs_of_patches_and_of_tokens_does_not_matter(loss_class):
    outputs = random_outputs(batch=4)
    pairs, patches, tokens = torch.randperm(4), torch.randperm(4), torch.randperm(5)
    shuffled = {name: value if value.ndim == 0 else value[pairs] for name, value in outputs.items()}
    shuffled["patch_features"] = shuffled["patch_features"][:, patches]
    shuffled["token_features"] = shuffled["token_features"][:, tokens]
    shuffled["token_mask"] = shuffled["token_mask"][:, tokens]
    assert_close(total(loss_class, shuffled), total(loss_class, outputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", [(1, 1), (0, 1), (1, 0)], ids=str)
def test_float64_stays_float64(any_loss_class, weights):
    options = dict(zip(("global_weight", "fine_grained_weight"), weights, strict=True))
    assert total(any_loss_class, random_outputs(), **options).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_features_give_a_float32_loss_near_the_right_one(any_loss_class, dtype):
    outputs = random_outputs(dtype=torch.float32)
    low = {name: value.to(dtype) if name in FEATURES[:4] else value for name, value in outputs.items()}
    term = total(any_loss_class, low, output_dict=True)["fine_grained_loss"]
    assert term.dtype == torch.float32
    assert_close(term, total(any_loss_class, outputs, output_dict=True)["fine_grained_loss"], rtol=0.1, atol=0.1)


def test_autocast_changes_no_bit_of_the_fine_grained_term_nor_of_its_gradient(any_loss_class):
    outputs = random_outputs(dtype=torch.float32)
    inputs = [outputs[name] for name in FEATURES]
    expected = total(any_loss_class, outputs, output_dict=True, global_weight=0)["fine_grained_loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        term = total(any_loss_class, outputs, output_dict=True, global_weight=0)["fine_grained_loss"]
    assert torch.equal(term, expected)
    gradients = (torch.autograd.grad(each, inputs, materialize_grads=True) for each in (term, expected))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_tiny_and_huge_features_give_finite_values_and_gradients(loss_class, scale):
    outputs = random_outputs(dtype=torch.float32)
    with torch.no_grad():
        outputs["patch_features"] *= scale
        outputs["token_features"] *= scale
    loss = total(loss_class, outputs)
    loss.backward()
    assert loss.isfinite()
    assert all(outputs[name].grad.isfinite().all() for name in FEATURES[2:4] if outputs[name].grad is not None)


@pytest.mark.parametrize("zero", ["patch_features", "token_features", "both"])
def test_zero_vectors_and_equal_patches_give_finite_values_and_gradients(loss_class, zero):
    outputs = random_outputs(dtype=torch.float32)
    with torch.no_grad():
        for name in ("patch_features", "token_features"):
            if zero in (name, "both"):
                outputs[name].zero_()
            else:
                outputs[name].copy_(outputs[name][:, :1].clone().expand_as(outputs[name]))
    loss = total(loss_class, outputs)
    loss.backward()
    assert loss.isfinite()
    assert all(outputs[name].grad.isfinite().all() for name in FEATURES if outputs[name].grad is not None)


def test_without_any_token_and_patch_the_fine_grained_term_is_zero_with_a_zero_gradient(any_loss_class):
    outputs = random_outputs()
    outputs["token_mask"] = torch.zeros(B, L, dtype=torch.bool)
    outputs["patch_mask"] = torch.zeros(B, P, dtype=torch.bool)
    term = total(any_loss_class, outputs, output_dict=True)["fine_grained_loss"]
    assert term == 0
    assert (torch.autograd.grad(term, outputs["patch_features"])[0] == 0).all()


def test_a_single_pair_of_one_patch_and_one_token_is_defined(loss_class):
    loss = total(loss_class, random_outputs(batch=1, patches=1, length=1, dim=1), global_weight=0)
    assert loss.isfinite()


def test_nan_in_a_patch_that_counts_is_not_hidden(loss_class):
    outputs = random_outputs()
    with torch.no_grad():
        outputs["patch_features"][0, 0, 0] = torch.nan
    assert total(loss_class, outputs).isnan()


def test_clip_loss_arguments_reach_clip_loss(any_loss_class):
    options = dict(local_loss=True, gather_with_grad=True, cache_labels=True, rank=1, world_size=2)
    loss = any_loss_class(**options).global_loss
    assert isinstance(loss, ClipLoss)
    assert {name: getattr(loss, name) for name in options} == options


def test_has_no_parameters_and_no_state(any_loss_class):
    assert not list(any_loss_class().parameters())
    assert not any_loss_class().state_dict()


def test_prints_every_setting(loss_class):
    text = repr(loss_class(fine_grained_weight=0.25))
    assert "fine_grained_weight=0.25" in text
    assert all(f"{name}=" in text for name in loss_class.settings)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"global_weight": -1}, ValueError, "global_weight is -1; expected a number of at least 0"),
        ({"global_weight": "1"}, TypeError, "global_weight is '1' (str); expected a number"),
        ({"fine_grained_weight": -0.5}, ValueError, "fine_grained_weight is -0.5; expected a number of at least 0"),
        ({"fine_grained_weight": "1"}, TypeError, "fine_grained_weight is '1' (str); expected a number"),
        ({"fine_grained_weight": torch.nan}, ValueError, "fine_grained_weight is nan; expected a finite number of at"),
        ({"fine_grained_weight": torch.inf}, ValueError, "fine_grained_weight is inf; expected a finite number of at"),
        ({"fine_grained_scale": 0}, ValueError, "fine_grained_scale is 0; expected a number above 0"),
        ({"fine_grained_scale": -1.0}, ValueError, "fine_grained_scale is -1.0; expected a number above 0"),
        ({"world_size": 4}, ValueError, "gather_with_grad is False with world_size 4; expected True"),
        ({"world_size": 0}, ValueError, "world_size is 0; expected a whole number of at least 1"),
        ({"world_size": "2"}, TypeError, "world_size is '2' (str); expected a whole number"),
        ({"global_loss": ClipLoss}, TypeError, "(type); expected a module such as open_clip.loss.SigLipLoss()"),
        (
            {"world_size": 2, "gather_with_grad": True, "global_loss": ClipLoss(world_size=2)},
            ValueError,
            "gather_with_grad is False with world_size 2; expected True",
        ),
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name(any_loss_class, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        any_loss_class(**options)


@pytest.mark.parametrize(
    ("global_loss", "further", "message"),
    [
        (ClipLoss(), {"logits": torch.ones(B, L, 7)}, "is a ClipLoss, which the model's outputs do not fit (got"),
        (SigLipLoss(), {}, "is a SigLipLoss, which the model's outputs do not fit (missing"),
        (ReturnsATensor(), {}, "global_loss returned Tensor; expected a dict with contrastive_loss"),
    ],
    ids=["a CoCa's outputs", "no bias", "a tensor"],
)
def test_a_global_loss_of_another_kind_of_model_is_refused(loss_class, global_loss, further, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        total(loss_class, {**random_outputs(), **further}, global_loss=global_loss, global_weight=1)


def test_a_global_loss_of_another_world_size_is_refused(any_loss_class):
    other = ClipLoss(world_size=4, gather_with_grad=True)
    message = f"global_loss has world_size 4; expected the same as {any_loss_class.__name__}, 1"
    with pytest.raises(ValueError, match=message):
        any_loss_class(global_loss=other)


BAD_BATCHES = [
    ("image_features", torch.ones(B, D).long(), TypeError, "has dtype torch.int64; expected a floating-point tensor"),
    ("image_features", torch.ones(1, B, D), ValueError, "has shape [1, 3, 6]; expected rank 2, [B, C]"),
    ("text_features", torch.ones(2, D), ValueError, "has B = 2 in shape [2, 6], image_features has B = 3; expected"),
    ("text_features", torch.ones(B, 2), ValueError, "has C = 2 in shape [3, 2], image_features has C = 6; expected"),
    ("text_features", torch.ones(B, D).to("meta"), ValueError, "is on meta and image_features on cpu; expected one"),
    ("patch_features", torch.ones(B, P, D).int(), TypeError, "has dtype torch.int32; expected a floating-point"),
    ("patch_features", torch.ones(P, D), ValueError, "has shape [4, 6]; expected rank 3, [B, P, D]"),
    ("patch_features", torch.ones(2, P, D), ValueError, "has B = 2 in shape [2, 4, 6], image_features has B = 3"),
    ("patch_features", torch.ones(B, P, D).to("meta"), ValueError, "is on meta and image_features on cpu; expected"),
    ("token_features", torch.ones(B, L, D).bool(), TypeError, "has dtype torch.bool; expected a floating-point"),
    ("token_features", torch.ones(B, D), ValueError, "has shape [3, 6]; expected rank 3, [B, L, D]"),
    ("token_features", torch.ones(B, L, 3), ValueError, "has D = 3 in shape [3, 5, 3], patch_features has D = 6"),
    ("token_mask", torch.ones(B, L), TypeError, "has dtype torch.float32; expected torch.bool, True where valid"),
    ("token_mask", torch.ones(B, 2).bool(), ValueError, "has shape [3, 2]; expected [B, L] = [3, 5]"),
    ("token_mask", torch.ones(B, L).bool().to("meta"), ValueError, "is on meta and the features on cpu; expected one"),
    ("patch_mask", torch.ones(B, 2).bool(), ValueError, "has shape [3, 2]; expected [B, P] = [3, 4]"),
    ("logit_scale", "14", TypeError, "is '14' (str); expected a number or a tensor of one element, 1/tau"),
    ("logit_scale", torch.ones(2), ValueError, "has shape [2]; expected one element, 1/tau"),
]


@pytest.mark.parametrize(
    ("name", "value", "error", "message"), BAD_BATCHES, ids=[f"{name} {message}" for name, *_, message in BAD_BATCHES]
)
def test_bad_batches_are_refused_by_name(any_loss_class, name, value, error, message):
    outputs = with_heads(any_loss_class, random_outputs(dtype=torch.float32))
    with pytest.raises(error, match=re.escape(f"{name} {message}")):
        any_loss_class()(**{**outputs, name: value})


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("token_features", torch.ones(B, L, 3), ValueError, "has D = 3 in shape [3, 5, 3], "),
        ("patch_features", torch.ones(B, 0, D), ValueError, "has P = 0 in shape [3, 0, 6]; expected at least 1"),
        ("token_features", torch.ones(B, 0, D), ValueError, "has shape [3, 0, 6]; expected no size of"),
        ("token_mask", torch.ones(B, L), TypeError, "has dtype torch.float32; expected torch.bool"),
        ("token_mask", torch.ones(B, 2).bool(), ValueError, "has shape [3, 2]; expected [B, L] = [3, 5]"),
        ("patch_mask", torch.ones(B, 2).bool(), ValueError, "has shape [3, 2]; expected [B, P] = [3, 4]"),
        ("region_mask", torch.ones(B, L, P).bool(), ValueError, "is given; expected None: "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_baselines_and_their_heads_cannot_use_is_refused_by_name(loss_class, name, value, error, message):
    with pytest.raises(error, match=re.escape(f"{name} {message}")):
        total(loss_class, {**random_outputs(dtype=torch.float32), name: value})


def test_a_batch_without_a_pair_is_refused(any_loss_class):
    outputs = random_outputs(dtype=torch.float32)
    empty = {name: value[:0] if value.ndim and len(value) == B else value for name, value in outputs.items()}
    # Heads refuse an empty batch before.
    empty |= {name: torch.zeros(0, L, D) for name in any_loss_class.further_inputs}
    with pytest.raises(ValueError, match=re.escape("image_features has shape [0, 6]; expected at least one pair")):
        any_loss_class()(**empty)


def test_outputs_of_evaluation_mode_are_refused_with_the_reason(any_loss_class):
    outputs = random_outputs(dtype=torch.float32)
    evaluated = {name: outputs[name] for name in ("image_features", "text_features", "logit_scale")}
    message = (
        f"{any_loss_class.__name__} got no patch_features, token_features, token_mask; expected the outputs of a "
        "model from sparc_loss.surface_embeddings in training mode (call model.train())"
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        any_loss_class()(**evaluated)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("implementation", ["eager", "fused"])
def test_what_stands_in_masked_places_reaches_neither_value_nor_gradient(any_loss_class, implementation, value):
    outputs = random_outputs()
    outputs["token_mask"] = torch.tensor([[True, False, True, False, True], [False] * 5, [True] * 5])
    outputs["patch_mask"] = torch.tensor([[True, True, False, True], [True] * 4, [False, True, False, False]])
    options = {}
    if any_loss_class is SparcLoss:
        options = {"implementation": implementation, "image_negatives": 2, "diagnostics": True}
        outputs["region_mask"] = torch.rand(B, L, P) < 0.8

    def terms_and_gradients(filling):
        changed = {name: each.detach().clone() for name, each in outputs.items()}
        changed["patch_features"][~outputs["patch_mask"]] = filling
        changed["token_features"][~outputs["token_mask"]] = filling
        inputs = [changed[name].requires_grad_() for name in FEATURES]
        terms = total(any_loss_class, changed, output_dict=True, **options)
        whole = sum(term for name, term in terms.items() if name.endswith("_loss"))
        return terms, torch.autograd.grad(whole, inputs, materialize_grads=True)

    terms, gradients = terms_and_gradients(value)
    assert_close((terms, gradients), terms_and_gradients(0.0), rtol=1e-12, atol=1e-12)
    by_patch, by_token = gradients[2:4]
    assert (by_patch[~outputs["patch_mask"]] == 0).all()
    assert (by_token[~outputs["token_mask"]] == 0).all()
