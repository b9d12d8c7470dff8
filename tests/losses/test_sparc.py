"""SparcLoss: open_clip's global loss and the fine-grained one, weighted (Eq. 7)."""

import re
import sys
from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from open_clip.loss import ClipLoss, CoCaLoss, DistillClipLoss
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.testing import assert_close

from sparc_loss import SparcLoss
from sparc_loss.functional import fine_grained_loss, image_contrastive_loss
from sparc_loss.losses.sparc import IMPLEMENTATIONS

B, P, L, D = 3, 6, 4, 5


@pytest.fixture
def outputs() -> dict[str, Tensor]:
    """What a surfaced model returns in training mode, every tensor of it a leaf with a gradient."""
    features = {
        "image_features": F.normalize(torch.randn(B, D), dim=-1),
        "text_features": F.normalize(torch.randn(B, D), dim=-1),
        "logit_scale": torch.tensor(10.0),
        "patch_features": torch.randn(B, P, D),
        "token_features": torch.randn(B, L, D),
    }
    features = {name: feature.requires_grad_() for name, feature in features.items()}
    return {**features, "token_mask": torch.arange(L) < torch.tensor([[4], [2], [0]])}


def fine_grained(outputs: dict[str, Tensor], **options: object) -> Tensor:
    arguments = {"logit_scale": outputs["logit_scale"], **options}
    return fine_grained_loss(outputs["patch_features"], outputs["token_features"], outputs["token_mask"], **arguments)


def image_contrastive(outputs: dict[str, Tensor], image_negatives: int, **options: object) -> Tensor:
    features = (outputs[name] for name in ("patch_features", "token_features", "token_mask"))
    arguments = {"logit_scale": outputs["logit_scale"], **options}
    return image_contrastive_loss(*features, image_negatives=image_negatives, **arguments)


def contrastive(outputs: dict[str, Tensor]) -> Tensor:
    return ClipLoss()(outputs["image_features"], outputs["text_features"], outputs["logit_scale"])


# The two halves


def test_golden_contrastive_and_fine_grained(golden: SimpleNamespace) -> None:
    loss = SparcLoss(1, 1, golden.threshold, golden.method, golden.reduction)
    terms = loss(
        golden.image_features,
        golden.text_features,
        torch.tensor(golden.logit_scale, dtype=torch.float64),
        golden.patch_features,
        golden.token_features,
        golden.token_mask,
        output_dict=True,
    )
    assert terms["contrastive_loss"].item() == pytest.approx(golden.contrastive, rel=1e-9, abs=1e-9)
    assert terms["fine_grained_loss"].item() == pytest.approx(golden.fine_grained, rel=1e-9, abs=1e-9)


def test_is_the_weighted_sum_of_clip_loss_and_fine_grained_loss(outputs: dict[str, Tensor]) -> None:
    terms = SparcLoss(global_weight=0.3, fine_grained_weight=2.0)(**outputs, output_dict=True)
    assert set(terms) == {"contrastive_loss", "fine_grained_loss"}
    assert_close(terms["contrastive_loss"], 0.3 * contrastive(outputs))
    assert_close(terms["fine_grained_loss"], 2.0 * fine_grained(outputs))


def test_default_weights_are_the_papers(outputs: dict[str, Tensor]) -> None:
    assert_close(SparcLoss()(**outputs), 0.5 * contrastive(outputs) + fine_grained(outputs))


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0.7},
        {"alignment": "dense"},
        {"alignment": "softmax"},
        {"reduction": "sample"},
    ],
    ids=str,
)
def test_settings_reach_the_fine_grained_half(outputs: dict[str, Tensor], options: dict) -> None:
    term = SparcLoss(**options)(**outputs, output_dict=True)["fine_grained_loss"]
    assert_close(term, fine_grained(outputs, **options))
    assert not torch.equal(term, fine_grained(outputs))


@pytest.mark.parametrize(("mask", "shape"), [("patch_mask", (B, P)), ("region_mask", (B, L, P))])
def test_masks_reach_the_fine_grained_half(outputs: dict[str, Tensor], mask: str, shape: tuple[int, ...]) -> None:
    masks = {mask: torch.rand(shape) < 0.5}
    term = SparcLoss()(**outputs, **masks, output_dict=True)["fine_grained_loss"]
    assert_close(term, fine_grained(outputs, **masks))
    assert not torch.equal(term, fine_grained(outputs))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_implementations_agree(outputs: dict[str, Tensor], implementation: str) -> None:
    assert_close(SparcLoss(implementation=implementation)(**outputs), SparcLoss(implementation="eager")(**outputs))


def test_a_logit_scale_of_shape_one_gives_a_scalar(outputs: dict[str, Tensor]) -> None:
    # open_clip's nonscalar_logit_scale, and logit_bias with it.
    bias = torch.tensor([-10.0], requires_grad=True)
    reshaped = {**outputs, "logit_scale": outputs["logit_scale"].reshape(1), "logit_bias": bias}
    for weights in ((0.5, 1), (0, 1), (1, 0)):
        assert SparcLoss(*weights, fine_grained_scale=2.0)(**reshaped).shape == ()


# The contrast with other images


@pytest.mark.parametrize("implementation", ["eager", "fused"])
def test_image_negatives_add_a_weighted_term_and_leave_the_others_bit_for_bit(
    outputs: dict[str, Tensor], implementation: str
) -> None:
    without = SparcLoss(implementation=implementation)(**outputs, output_dict=True)
    loss = SparcLoss(implementation=implementation, image_negatives=2, image_contrastive_weight=0.7)
    terms = loss(**outputs, output_dict=True)
    assert list(terms) == [*without, "image_contrastive_loss"]
    assert all(torch.equal(terms[name], without[name]) for name in without)
    assert_close(terms["image_contrastive_loss"], 0.7 * image_contrastive(outputs, 2))
    assert_close(loss(**outputs), sum(terms.values()))


def test_without_image_negatives_the_contrast_is_not_computed(outputs: dict[str, Tensor]) -> None:
    for options in ({}, {"image_negatives": 2, "image_contrastive_weight": 0}):
        for implementation in IMPLEMENTATIONS:
            with refused_contrast():
                terms = SparcLoss(implementation=implementation, **options)(**outputs, output_dict=True)
            assert list(terms) == ["contrastive_loss", "fine_grained_loss"]


def refused_contrast() -> ExitStack:
    stack = ExitStack()
    for module in ("functional", "fused"):
        name = f"sparc_loss.{module}.image_contrastive_loss"
        stack.enter_context(mock.patch(name, side_effect=AssertionError("called")))
    return stack


@pytest.mark.parametrize("implementation", ["eager", "fused"])
def test_the_contrast_with_other_images_works_alone(outputs: dict[str, Tensor], implementation: str) -> None:
    loss = SparcLoss(0, 0, image_negatives=1, implementation=implementation)
    assert_close(loss(**outputs), image_contrastive(outputs, 1))
    loss(**outputs).backward()
    assert outputs["patch_features"].grad.any()
    assert outputs["token_features"].grad.any()


@pytest.mark.parametrize("implementation", ["eager", "fused"])
@pytest.mark.parametrize(
    "options",
    [{"threshold": 0.7}, {"alignment": "dense"}, {"alignment": "softmax"}, {"reduction": "sample"}],
    ids=str,
)
def test_settings_reach_the_contrast_with_other_images(
    outputs: dict[str, Tensor], options: dict, implementation: str
) -> None:
    loss = SparcLoss(image_negatives=2, implementation=implementation, **options)
    term = loss(**outputs, output_dict=True)["image_contrastive_loss"]
    assert_close(term, image_contrastive(outputs, 2, **options))
    assert not torch.equal(term, image_contrastive(outputs, 2))


@pytest.mark.parametrize("implementation", ["eager", "fused"])
def test_a_threshold_and_a_direction_of_the_contrast_alone(outputs: dict[str, Tensor], implementation: str) -> None:
    own = {"image_contrastive_threshold": 1.0, "image_contrastive_direction": "both"}
    plain = SparcLoss(implementation=implementation, threshold=0.3)(**outputs, output_dict=True)
    loss = SparcLoss(implementation=implementation, threshold=0.3, image_negatives=2, **own)
    terms = loss(**outputs, output_dict=True)
    assert torch.equal(terms["fine_grained_loss"], plain["fine_grained_loss"])
    expected = image_contrastive(outputs, 2, threshold=1.0, direction="both")
    assert_close(terms["image_contrastive_loss"], expected)
    assert not torch.isclose(expected, image_contrastive(outputs, 2, threshold=1.0))
    assert not torch.isclose(expected, image_contrastive(outputs, 2, threshold=0.3, direction="both"))


@pytest.mark.parametrize(("mask", "shape"), [("patch_mask", (B, P)), ("region_mask", (B, L, P))])
def test_masks_reach_the_contrast_with_other_images(
    outputs: dict[str, Tensor], mask: str, shape: tuple[int, ...]
) -> None:
    masks = {mask: torch.rand(shape) < 0.5}
    term = SparcLoss(image_negatives=2)(**outputs, **masks, output_dict=True)["image_contrastive_loss"]
    assert_close(term, image_contrastive(outputs, 2, **masks))
    assert not torch.equal(term, image_contrastive(outputs, 2))


def test_the_contrast_with_other_images_has_the_scale_of_the_fine_grained_half(outputs: dict[str, Tensor]) -> None:
    terms = SparcLoss(image_negatives=1, fine_grained_scale=3.0)(**outputs, output_dict=True)
    assert_close(terms["image_contrastive_loss"], image_contrastive(outputs, 1, logit_scale=3.0))


@pytest.mark.parametrize("negatives", [3, 40])
def test_a_batch_with_fewer_other_images_uses_those_it_has(outputs: dict[str, Tensor], negatives: int) -> None:
    terms = SparcLoss(image_negatives=negatives)(**outputs, output_dict=True)
    assert_close(terms["image_contrastive_loss"], image_contrastive(outputs, 2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_batch_of_one_pair_has_a_contrast_of_zero_that_is_attached(
    outputs: dict[str, Tensor], implementation: str
) -> None:
    one = {name: value[:1] if value.ndim else value for name, value in outputs.items()}
    loss = SparcLoss(image_negatives=3, implementation=implementation)
    term = loss(**one, output_dict=True)["image_contrastive_loss"]
    term.backward()
    assert term == 0
    assert (outputs["patch_features"].grad == 0).all()


# A weight of zero


class Infinite(torch.nn.Module):
    def forward(self, **_: Tensor) -> dict[str, Tensor]:
        return {"contrastive_loss": torch.tensor(torch.inf), "caption_loss": torch.tensor(2.0)}


def test_a_global_weight_of_zero_leaves_the_other_terms_of_a_global_loss(outputs: dict[str, Tensor]) -> None:
    terms = SparcLoss(global_weight=0, global_loss=Infinite())(**outputs, logits=torch.ones(1), output_dict=True)
    assert (terms["contrastive_loss"], terms["caption_loss"]) == (0, 2)


def test_a_global_weight_of_zero_skips_the_global_loss(outputs: dict[str, Tensor]) -> None:
    loss = SparcLoss(global_weight=0, global_loss=Refuses())
    assert_close(loss(**outputs), fine_grained(outputs))


@pytest.mark.parametrize("implementation", ["eager", "fused"])
def test_a_fine_grained_weight_of_zero_skips_the_fine_grained_loss(
    outputs: dict[str, Tensor], implementation: str
) -> None:
    loss = SparcLoss(fine_grained_weight=0, global_weight=1, implementation=implementation)
    module = "functional" if implementation == "eager" else "fused"
    with mock.patch(f"sparc_loss.{module}.fine_grained_loss", side_effect=AssertionError("called")):
        total = loss(**outputs)
    assert torch.equal(total, contrastive(outputs))


@pytest.mark.parametrize("fine_grained_scale", [None, 3.0])
@pytest.mark.parametrize("weights", [(0, 1), (0, 0)], ids=str)
def test_without_the_global_half_its_inputs_still_get_a_gradient(
    outputs: dict[str, Tensor], weights: tuple[float, float], fine_grained_scale: float | None
) -> None:
    """DistributedDataParallel waits for the gradient of every parameter."""
    logit_bias = torch.tensor(-10.0, requires_grad=True)
    SparcLoss(*weights, fine_grained_scale=fine_grained_scale)(**outputs, logit_bias=logit_bias).backward()
    assert (outputs["image_features"].grad == 0).all()
    assert (outputs["text_features"].grad == 0).all()
    assert logit_bias.grad == 0
    assert outputs["logit_scale"].grad is not None


def test_clip_loss_alone_has_clip_loss_gradients_bit_for_bit(outputs: dict[str, Tensor]) -> None:
    names = ("image_features", "text_features", "logit_scale")
    ours = torch.autograd.grad(SparcLoss(1, 0)(**outputs), [outputs[name] for name in names])
    clips = torch.autograd.grad(contrastive(outputs), [outputs[name] for name in names])
    assert all(torch.equal(*pair) for pair in zip(ours, clips, strict=True))


# Other global losses


def test_coca_loss_gets_the_models_further_outputs_and_its_caption_loss_stays_unweighted(
    outputs: dict[str, Tensor],
) -> None:
    coca = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)
    captioning = {"logits": torch.randn(B, 7, 11), "labels": torch.randint(1, 11, (B, 7))}
    terms = SparcLoss(global_weight=0.5, global_loss=coca)(**outputs, **captioning, output_dict=True)
    plain = {name: outputs[name] for name in ("image_features", "text_features", "logit_scale")}
    expected = coca(**plain, **captioning, output_dict=True)
    assert list(terms) == ["contrastive_loss", "caption_loss", "fine_grained_loss"]
    assert_close(terms["contrastive_loss"], 0.5 * expected["contrastive_loss"])
    assert torch.equal(terms["caption_loss"], expected["caption_loss"])


def test_distill_clip_loss_gets_the_teachers_outputs_and_its_distill_loss_stays_unweighted(
    outputs: dict[str, Tensor],
) -> None:
    teacher = {
        "dist_image_features": F.normalize(torch.randn(B, D), dim=-1),
        "dist_text_features": F.normalize(torch.randn(B, D), dim=-1),
        "dist_logit_scale": torch.tensor(20.0),
    }
    terms = SparcLoss(global_weight=0.5, global_loss=DistillClipLoss())(**outputs, **teacher, output_dict=True)
    plain = {name: outputs[name] for name in ("image_features", "text_features", "logit_scale")}
    expected = DistillClipLoss()(**plain, **teacher, output_dict=True)
    assert_close(terms["contrastive_loss"], 0.5 * expected["contrastive_loss"])
    assert torch.equal(terms["distill_loss"], expected["distill_loss"])


def test_clip_loss_is_not_made_when_another_is_given() -> None:
    with mock.patch.dict(sys.modules, {"open_clip.loss": None}):
        SparcLoss(global_loss=Refuses())


# As a module


def test_prints_its_settings() -> None:
    loss = SparcLoss(alignment="dense", image_negatives=3, image_contrastive_weight=0.25)
    assert loss.extra_repr() == (
        "global_weight=0.5, fine_grained_weight=1.0, threshold=None, alignment='dense', reduction='token', "
        "fine_grained_scale=None, image_negatives=3, image_contrastive_weight=0.25, "
        "image_contrastive_threshold=None, image_contrastive_direction='text_to_image'"
    )


# What the loss is computed from, beside what is always there.
COMPILED = [
    {},
    {"reduction": "sample", "threshold": 0.5},
    {"alignment": "softmax"},
    {"image_negatives": 2},
    {"implementation": "eager", "image_negatives": 2, "reduction": "sample"},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", COMPILED, ids=str)
def test_compiles_without_a_graph_break(outputs: dict[str, Tensor], options: dict) -> None:
    torch.compiler.reset()
    loss = SparcLoss(**options)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    assert_close(compiled(**outputs), loss(**outputs))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("options", COMPILED, ids=str)
def test_other_batch_sizes_compile_without_a_graph_break(options: dict, dynamic: bool | None) -> None:
    """With dynamic=None the second size makes the shapes dynamic."""
    torch.compiler.reset()
    # The global loss of its own: open_clip's ClipLoss keeps labels by the batch size.
    loss = SparcLoss(global_loss=Sum(), **options)
    compiled = torch.compile(loss, backend="eager", fullgraph=True, dynamic=dynamic)
    for size in (4, 7, 5):
        batch = {
            "image_features": torch.randn(size, D),
            "text_features": torch.randn(size, D),
            "logit_scale": torch.tensor(10.0),
            "patch_features": torch.randn(size, P, D),
            "token_features": torch.randn(size, L, D),
            "token_mask": torch.rand(size, L) < 0.7,
            "patch_mask": torch.rand(size, P) < 0.9,
            "region_mask": torch.rand(size, L, P) < 0.9,
        }
        assert_close(compiled(**batch), loss(**batch))


class Sum(nn.Module):
    """In place of ClipLoss."""

    def forward(self, image_features, text_features, logit_scale, output_dict):
        return {"contrastive_loss": (image_features * text_features).sum() * logit_scale}


# Other ways to differentiate


@pytest.mark.parametrize("options", [{}, {"image_negatives": 2}], ids=str)
def test_auto_takes_eager_in_a_transform_of_torch_func(outputs: dict[str, Tensor], options: dict) -> None:
    def of_patches(patch_features: Tensor) -> Tensor:
        return SparcLoss(**options)(**{**outputs, "patch_features": patch_features})

    expected = torch.autograd.grad(of_patches(outputs["patch_features"]), outputs["patch_features"])[0]
    patches = outputs["patch_features"].detach()
    assert_close(torch.func.grad(of_patches)(patches), expected)
    tangent = torch.randn_like(patches)
    # torch gives the tangent of a float32 loss in float64.
    slope = torch.func.jvp(of_patches, (patches,), (tangent,))[1]
    assert_close(slope, (expected * tangent).sum(), check_dtype=False)
    with torch.autograd.forward_ad.dual_level():
        dual = of_patches(torch.autograd.forward_ad.make_dual(patches, tangent))
        slope = torch.autograd.forward_ad.unpack_dual(dual).tangent
        assert_close(slope, (expected * tangent).sum(), check_dtype=False)


@pytest.mark.parametrize("options", [{}, {"fine_grained_weight": 0.0, "image_negatives": 2}], ids=str)
def test_fused_in_a_transform_of_torch_func_names_eager(outputs: dict[str, Tensor], options: dict) -> None:
    def of_patches(patch_features: Tensor) -> Tensor:
        return SparcLoss(implementation="fused", **options)(**{**outputs, "patch_features": patch_features})

    message = (
        'the fused loss supports neither torch.func nor forward-mode differentiation; take implementation="eager"'
    )
    patches = outputs["patch_features"].detach()
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.func.grad(of_patches)(patches)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match=re.escape(message)):
        of_patches(torch.autograd.forward_ad.make_dual(patches, torch.ones_like(patches)))


@pytest.mark.parametrize("implementation", ["auto", "eager"])
def test_works_on_the_meta_device(outputs: dict[str, Tensor], implementation: str) -> None:
    loss = SparcLoss(implementation=implementation, image_negatives=2)
    meta = {
        name: value.detach().to("meta").requires_grad_(value.is_floating_point()) for name, value in outputs.items()
    }
    total = loss(**meta)
    total.backward()
    assert total.shape == ()
    assert meta["patch_features"].grad.shape == (B, P, D)


@pytest.mark.parametrize("reduction", ["token", "sample"])
def test_other_caption_lengths_compile_nothing_anew(outputs: dict[str, Tensor], reduction: str) -> None:
    torch.compiler.reset()
    counter = CompileCounter()
    loss = SparcLoss(reduction=reduction)
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    longest = outputs["token_mask"].shape[1]
    for length in range(longest + 1):
        batch = {**outputs, "token_mask": (torch.arange(longest) < length).expand_as(outputs["token_mask"])}
        assert_close(compiled(**batch), loss(**batch))
    assert counter.frame_count == 1


# Bad settings


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threshold": 2}, ValueError, "threshold is 2; expected a number between 0 and 1"),
        ({"threshold": "auto"}, TypeError, "threshold is 'auto' (str); expected a number"),
        ({"alignment": "hard"}, ValueError, "alignment is 'hard'; expected one of 'sparse', 'dense', 'softmax'"),
        ({"reduction": "sum"}, ValueError, "reduction is 'sum'; expected one of 'token', 'sample'"),
        ({"image_negatives": -1}, ValueError, "image_negatives is -1; expected a whole number of at least 0"),
        (
            {"image_contrastive_threshold": 1.5},
            ValueError,
            "image_contrastive_threshold is 1.5; expected a number between 0 and 1",
        ),
        (
            {"image_contrastive_direction": "one"},
            ValueError,
            "image_contrastive_direction is 'one'; expected one of 'text_to_image', 'both'",
        ),
        ({"image_negatives": 1.5}, TypeError, "image_negatives is 1.5 (float); expected a whole number"),
        (
            {"image_contrastive_weight": -1},
            ValueError,
            "image_contrastive_weight is -1; expected a number of at least 0",
        ),
        ({"implementation": "cuda"}, ValueError, "implementation is 'cuda'; expected one of 'auto', 'eager', 'fused'"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        SparcLoss(**options)


def test_the_refusal_of_world_size_gives_the_reason() -> None:
    with pytest.raises(ValueError, match="its ratio to the fine-grained one changes with the number of processes"):
        SparcLoss(world_size=2, local_loss=True)


def test_a_region_mask_of_another_shape_is_refused_by_name(outputs: dict[str, Tensor]) -> None:
    message = "region_mask has shape [3, 6, 4]; expected [B, L, P] = [3, 4, 6]"
    with pytest.raises(ValueError, match=re.escape(message)):
        SparcLoss()(**outputs, region_mask=torch.ones(B, P, L, dtype=torch.bool))


class Refuses(nn.Module):
    """A global loss that must not be called."""

    def forward(self, **_: object) -> None:
        raise AssertionError("called")
