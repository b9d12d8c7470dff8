"""`surface_embeddings`: the same model, which also returns patch and token embeddings while it trains."""

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from major_version import MAJOR_VERSION, only_open_clip_3
from open_clip import CLIP, CoCa, CoCaLoss, CustomTextCLIP
from tiny_models import (
    CUSTOM_TEXT,
    EMBED_DIM,
    POOLERS,
    TEXT,
    TRANSFORMER,
    VISION,
    VIT,
    ToyTokenizer,
    captions,
    clip,
    coca,
    custom_text_clip,
    hf_clip,
    hf_text,
    images_for,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparc_loss import SparcLoss, restore, surface_embeddings

EXTRA = {"patch_features", "token_features", "token_mask"}
MODELS: dict[str, Callable[[Path], nn.Module]] = {
    **{f"CLIP, {vision}": lambda _, vision=vision: clip(vision) for vision in VISION},
    **{f"CLIP, text {text}": lambda _, text=text: clip(text=text) for text in TEXT},
    **{f"CustomTextCLIP, text {text}": lambda _, text=text: custom_text_clip(text=text) for text in CUSTOM_TEXT},
    "CustomTextCLIP, timm ViT map": lambda _: custom_text_clip("timm ViT map"),
    "CustomTextCLIP, SigLIP's bias": lambda _: custom_text_clip(init_logit_bias=-10.0),
    "CLIP, logit_scale of shape [1]": lambda _: clip(nonscalar_logit_scale=True, init_logit_bias=-10.0),
    **{f"HF, {pooler}": lambda folder, pooler=pooler: hf_clip(folder, pooler) for pooler in POOLERS},
    "HF, mT5": lambda folder: hf_clip(folder, architecture="google/mt5"),
    "HF, NLLB": lambda folder: hf_clip(folder, "cls_pooler", architecture="facebook/nllb"),
    "HF, RoBERTa": lambda folder: hf_clip(folder, architecture="roberta"),
    "HF, XLM-RoBERTa": lambda folder: hf_clip(folder, architecture="xlm-roberta"),
    "HF, mean_pooler, mlp": lambda folder: hf_clip(folder, projection="mlp"),
    "CoCa": lambda _: coca(),
    "CoCa, ViT tok": lambda _: coca("ViT tok"),
    "CoCa, HF": lambda folder: coca("ViT tok", hf_text(folder)),
}


@pytest.fixture(params=MODELS)
def plain(request: pytest.FixtureRequest, tmp_path: Path) -> nn.Module:
    """A model as open_clip makes it, returning dictionaries as open_clip_train asks it to."""
    model = MODELS[request.param](tmp_path)
    if not isinstance(model, CoCa):
        model.output_dict = True
    return model


def surfaced_copy(model: nn.Module) -> nn.Module:
    return surface_embeddings(copy.deepcopy(model), ToyTokenizer())


def run(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """A forward pass with dropout drawn from the same seed every time."""
    torch.manual_seed(5)
    return model(*inputs)


# What it returns


def counting(calls: list[str], kind: str) -> Callable[..., None]:
    return lambda *_: calls.append(kind)


def pooled_loss(output: dict[str, Tensor]) -> Tensor:
    return (output["image_features"] @ output["text_features"].T * output["logit_scale"]).diagonal().sum()


def test_in_training_it_is_the_plain_model_bit_for_bit_with_three_more_outputs(plain: nn.Module) -> None:
    images, texts = images_for(plain, number=3), captions(3)
    surfaced = surfaced_copy(plain).train()
    calls: list[str] = []
    text_tower = surfaced if isinstance(surfaced, CLIP) else surfaced.text
    for kind, tower, first in (("image", surfaced.visual, nn.Conv2d), ("text", text_tower, nn.Embedding)):
        layer = next(module for module in tower.modules() if isinstance(module, first))
        layer.register_forward_hook(counting(calls, kind))

    expected, output = run(plain.train(), images, texts), run(surfaced, images, texts)
    assert sorted(calls) == ["image", "text"]
    assert set(output) == set(expected) | EXTRA
    for name, value in expected.items():
        assert torch.equal(output[name], value), name
    # Statistics of batches move as the plain model's.
    for (name, value), buffer in zip(plain.named_buffers(), surfaced.buffers(), strict=True):
        assert torch.equal(buffer, value), name
    pooled_loss(expected).backward()
    pooled_loss(output).backward()
    for (name, value), parameter in zip(plain.named_parameters(), surfaced.named_parameters(), strict=True):
        if value.grad is not None:
            assert torch.equal(parameter[1].grad, value.grad), name

    dim = output["image_features"].shape[-1]
    height, width = surfaced.encode_patches(images)[1]
    assert output["patch_features"].shape == (3, height * width, dim)
    assert output["token_features"].shape == (3, texts.shape[1], dim)
    assert (output["token_mask"].shape, output["token_mask"].dtype) == (texts.shape, torch.bool)


def test_in_evaluation_and_in_a_checkpoint_it_is_the_plain_model(plain: nn.Module) -> None:
    inputs = images_for(plain), captions()
    surfaced = surfaced_copy(plain)
    expected, output = run(plain.eval(), *inputs), run(surfaced.eval(), *inputs)
    assert set(output) == set(expected)
    for name, value in expected.items():
        assert torch.equal(output[name], value), name
    assert list(surfaced.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in surfaced.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in surfaced.named_modules()] == [name for name, _ in plain.named_modules()]
    plain.load_state_dict(surfaced.state_dict(), strict=True)
    surfaced.load_state_dict(plain.state_dict(), strict=True)


# Parameters that serve the pooled feature alone.
POOLING_ONLY = (
    r"visual\.attn_pool\.(query|ln_q\..*|attn\.[qk]_proj_weight)",  # CoCa's queries and keys
    r"visual\.attnpool\.(positional_embedding|[qk]_proj\..*)",  # ModifiedResNet's attention
    r"text\.transformer\.pooler\..*",  # BERT's, of its first token
    r"text_decoder\..*",
    "logit_scale",
    "logit_bias",
)


def test_every_parameter_that_trains_in_clip_trains_under_sparc_and_patches_and_tokens_reach_theirs(
    plain: nn.Module,
) -> None:
    inputs = images_for(plain), captions(3)[1:]
    surfaced = surfaced_copy(plain).train()
    global_loss = CoCaLoss(caption_loss_weight=1, clip_loss_weight=1) if isinstance(plain, CoCa) else None
    output = run(surfaced, *inputs)
    local = output["patch_features"].square().sum() + output["token_features"].square().sum()
    used = torch.autograd.grad(local, list(surfaced.parameters()), retain_graph=True, allow_unused=True)
    without = [name for (name, _), gradient in zip(surfaced.named_parameters(), used, strict=True) if gradient is None]
    assert all(re.fullmatch("|".join(POOLING_ONLY), name) for name in without), without
    assert all(gradient.isfinite().all() for gradient in used if gradient is not None)

    if isinstance(plain, CoCa) and "labels" not in output:  # open_clip 4, whose CoCaTask adds them
        output |= {"logits": output["logits"][:, :-1], "labels": inputs[1][:, 1:]}
    SparcLoss(global_loss=global_loss)(**output).backward()
    sum(value.sum() for value in run(plain.train(), *inputs).values()).backward()
    for (name, ours), clips in zip(surfaced.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (clips.grad is None), name


def test_patch_dropout_leaves_the_pooled_features_alone() -> None:
    torch.manual_seed(0)
    plain = CLIP(EMBED_DIM, {**VIT, "patch_dropout": 0.5}, TRANSFORMER, output_dict=True)
    inputs = images_for(plain), captions()
    output = run(surfaced_copy(plain).train(), *inputs)
    assert torch.equal(output["image_features"], run(plain.train(), *inputs)["image_features"])
    assert output["patch_features"].shape == (2, 3, EMBED_DIM)


@only_open_clip_3
@pytest.mark.parametrize("labels", [True, False])
def test_coca_returns_labels_only_where_asked(labels: bool) -> None:
    plain = coca().train()
    inputs = images_for(plain), captions()
    torch.manual_seed(5)
    expected = plain(*inputs, output_labels=labels)
    output = surfaced_copy(plain)(*inputs, output_labels=labels)
    assert set(output) == set(expected) | EXTRA
    assert torch.equal(output["logits"], expected["logits"])


def test_cocas_generation_from_an_image_already_encoded_is_left_to_open_clip() -> None:
    plain = coca().train()
    encoded = plain(images_for(plain))
    latent, embeddings = encoded["image_features"], encoded["image_embs"]
    output = surfaced_copy(plain)(images_for(plain), captions(), latent, embeddings)
    expected = plain(images_for(plain), captions(), latent, embeddings)
    assert set(output) == set(expected)
    assert torch.equal(output["logits"], expected["logits"])


@pytest.mark.parametrize("side", ["image", "text"])
def test_one_modality_alone_is_left_to_open_clip(side: str) -> None:
    plain = clip(output_dict=True).train()
    arguments = {"image": images_for(plain)} if side == "image" else {"text": captions()}
    output = surfaced_copy(plain)(**arguments)
    expected = plain(**arguments)
    assert set(output) == set(expected)
    assert torch.equal(output[f"{side}_features"], expected[f"{side}_features"])


def test_the_embeddings_are_not_normalised() -> None:
    output = surface_embeddings(clip(), ToyTokenizer())(images_for(clip()), captions())
    for name in ("patch_features", "token_features"):
        norms = output[name].norm(dim=-1)
        assert not torch.allclose(norms, torch.ones_like(norms), atol=0.01)


def test_the_token_mask_counts_words_by_default_and_start_and_end_with_all() -> None:
    # START, one or two words, END, padding.
    texts = captions()
    words = surface_embeddings(clip(), ToyTokenizer())(images_for(clip()), texts)["token_mask"]
    everything = surface_embeddings(clip(), ToyTokenizer(), tokens="all")(images_for(clip()), texts)["token_mask"]
    assert words.int().tolist() == [[0, 1, 0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0]]
    assert everything.int().tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]


# The encoders of their own


@pytest.mark.parametrize("training", [True, False])
def test_encoders_give_what_training_gives_in_any_mode(training: bool) -> None:
    model = surface_embeddings(clip(), ToyTokenizer()).train()
    images, texts = images_for(model), captions()
    output = model(images, texts)
    model.train(training)
    assert torch.equal(model.encode_patches(images)[0], output["patch_features"])
    tokens, mask = model.encode_tokens(texts)
    assert torch.equal(tokens, output["token_features"])
    assert torch.equal(mask, output["token_mask"])


def test_encoders_normalise_when_asked() -> None:
    model = surface_embeddings(clip(), ToyTokenizer())
    patches, _ = model.encode_patches(images_for(model), normalize=True)
    tokens, _ = model.encode_tokens(captions(), normalize=True)
    for features in (patches, tokens):
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(features.shape[:2]))


# The same model


def test_it_is_the_same_object_and_still_an_open_clip_model() -> None:
    for model, open_clip_class in ((clip(), CLIP), (custom_text_clip(), CustomTextCLIP)):
        assert surface_embeddings(model, ToyTokenizer()) is model
        assert isinstance(model, open_clip_class)


def test_surfacing_twice_takes_the_new_tokens_and_nothing_else() -> None:
    model = surface_embeddings(clip(), ToyTokenizer())
    swapped = type(model)
    assert surface_embeddings(model, ToyTokenizer(), tokens="all") is model
    assert type(model) is swapped
    assert model.encode_tokens(captions())[1].sum() == 3 + 4


@pytest.mark.parametrize("output_dict", [True, False])
def test_restore_gives_back_the_plain_model(output_dict: bool) -> None:
    plain = clip(output_dict=output_dict)
    model = copy.deepcopy(plain)
    attributes = set(vars(model))
    assert restore(surface_embeddings(surface_embeddings(model, ToyTokenizer()), ToyTokenizer())) is model
    assert type(model) is CLIP
    assert model.output_dict is output_dict
    assert set(vars(model)) == attributes
    assert type(model(images_for(model), captions())) is type(plain(images_for(plain), captions()))


def test_restore_gives_back_a_coca_which_has_no_output_dict() -> None:
    model = coca()
    attributes = set(vars(model))
    assert type(restore(surface_embeddings(model, ToyTokenizer()))) is CoCa
    assert set(vars(model)) == attributes


def test_restore_leaves_a_plain_model_alone() -> None:
    model = clip()
    assert restore(model) is model
    assert type(model) is CLIP


@pytest.mark.parametrize(
    "round_trip", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("make", [clip, custom_text_clip, coca])
def test_copies_are_surfaced_too(make: Callable[[], nn.Module], round_trip: Callable) -> None:
    model = surface_embeddings(make(), ToyTokenizer()).train()
    again = round_trip(model)
    inputs = images_for(model), captions()
    output, copied = model(*inputs), again(*inputs)
    assert type(again) is type(model)
    assert all(torch.equal(copied[name], value) for name, value in output.items())


COMPILED = {
    "CLIP": clip,
    "CoCa": coca,
    **{name: lambda name=name: clip(name) for name in ("ModifiedResNet", "Eva PE", "Swin")},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiles(name: str) -> None:
    torch.compiler.reset()
    model = surface_embeddings(COMPILED[name](), ToyTokenizer()).train()
    inputs = images_for(model), captions()
    output, compiled = run(model, *inputs), run(torch.compile(model, backend="eager"), *inputs)
    for name, value in output.items():
        torch.testing.assert_close(compiled[name], value)


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint")
def test_autocast_and_gradient_checkpointing_change_nothing(plain: nn.Module) -> None:
    surfaced = surfaced_copy(plain).train()
    inputs = images_for(plain), captions()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = run(plain.train(), *inputs)
        expected = run(surfaced, *inputs)
        surfaced.set_grad_checkpointing()
        output = run(surfaced, *inputs)
    for name, value in pooled.items():
        assert torch.equal(expected[name], value), name
    for name, value in expected.items():
        torch.testing.assert_close(output[name], value)


# What is refused


def with_visual(config: dict) -> CLIP:
    return CLIP(EMBED_DIM, config, TRANSFORMER)


def with_timm(name: str, pool: str = "avg") -> CLIP:
    return with_visual({"timm_model_name": name, "timm_pool": pool, "image_size": 64})


def with_positions_in_its_pool() -> CLIP:
    model = clip("timm ViT map")
    model.visual.trunk.attn_pool.pos_embed = nn.Parameter(torch.zeros(6, 32))
    return model


REFUSED_MODELS: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "no pooling": (
        lambda _: with_visual({**VIT, "pool_type": "none"}),
        "model.visual is a VisionTransformer with pool_type 'none'; patch embeddings are known for open_clip's "
        "VisionTransformer (pool_type 'tok' or 'avg', attentional_pool true or false), ModifiedResNet, and timm's "
        "VisionTransformer, VisionTransformerRelPos, Eva, ConvNeXt, FastVit, SwinTransformer",
    ),
    "two attentional poolers": (
        lambda _: with_visual({**VIT, "attentional_pool": "parallel", "attn_pooler_heads": 2}),
        "model.visual is a VisionTransformer with attentional_pool 'parallel'; patch embeddings are known for",
    ),
    "another timm trunk": (
        lambda _: with_timm("test_resnet"),
        "model.visual is a TimmModel with a ResNet trunk; patch embeddings are known for",
    ),
    "a pool of the adapter's own": (
        lambda _: with_timm("test_convnext", pool="rot_attn"),
        "model.visual is a TimmModel with a RotAttentionPool2d of its own; patch embeddings are known for",
    ),
    "a pool with positions": (
        lambda _: with_positions_in_its_pool(),
        "model.visual is a TimmModel with a AttentionPoolLatent that knows positions; patch embeddings are known for",
    ),
    "a max pooler": (
        lambda folder: hf_clip(folder, "max_pooler"),
        "model.text is a HFTextEncoder with a max_pooler, whose forward fails in open_clip 3; token embeddings are "
        "known for CLIP's own text tower, TextTransformer, ModernTextTransformer and HFTextEncoder with a mean_poo",
    ),
    "another library's model": (
        lambda _: nn.Linear(2, 2),
        "model is a Linear; expected open_clip's CLIP, CustomTextCLIP or CoCa",
    ),
    "a compiled model": (
        lambda _: torch.compile(clip(), backend="eager"),
        "model is a OptimizedModule; expected open_clip's CLIP, CustomTextCLIP or CoCa; surface the model before it",
    ),
    "a compiled surfaced model": (
        lambda _: torch.compile(surface_embeddings(clip(), ToyTokenizer()), backend="eager"),
        "surface the model before it is wrapped",
    ),
    "TorchScript, scripted": (
        lambda _: torch.jit.script(clip()),
        "model is a RecursiveScriptModule, compiled by TorchScript, whose class cannot be swapped; expected an",
    ),
    "TorchScript, traced": (
        lambda _: torch.jit.trace(clip().eval(), (images_for(clip()), captions()), check_trace=False),
        "compiled by TorchScript, whose class cannot be swapped; expected an open_clip model created without jit "
        "(open_clip_train: without --torchscript and --trace)",
    ),
}


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated, and says much about tracing.
@pytest.mark.parametrize("name", REFUSED_MODELS)
def test_a_model_that_is_not_covered_is_refused_by_name(name: str, tmp_path: Path) -> None:
    if name == "TorchScript, scripted" and MAJOR_VERSION != 3:
        pytest.skip("this open_clip cannot be scripted")
    make, message = REFUSED_MODELS[name]
    with pytest.raises(TypeError, match=re.escape(message)):
        surface_embeddings(make(tmp_path), ToyTokenizer())


@only_open_clip_3
def test_what_is_said_of_the_max_pooler_is_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="only supports boolean masks"):
        hf_clip(tmp_path, "max_pooler").encode_text(captions())


def test_a_model_wrapped_for_ddp_is_refused_with_the_order(tmp_path: Path) -> None:
    dist.init_process_group("gloo", f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(clip())
        with pytest.raises(TypeError, match=r"model is a DistributedDataParallel; .*before it is wrapped"):
            surface_embeddings(wrapped, ToyTokenizer())
    finally:
        dist.destroy_process_group()


def test_an_unknown_tokenizer_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"tokenizer is a function; expected what open_clip\.get_tokenizer returns"):
        surface_embeddings(clip(), captions)


def test_unknown_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens is 'nouns'; expected one of 'words', 'all'"):
        surface_embeddings(clip(), ToyTokenizer(), tokens="nouns")


def test_a_refused_model_is_left_as_it_was() -> None:
    model = with_visual({**VIT, "pool_type": "none"})
    attributes = set(vars(model))
    with pytest.raises(TypeError):
        surface_embeddings(model, ToyTokenizer())
    assert type(model) is CLIP
    assert set(vars(model)) == attributes
