"""Readings of a ViT's last block, against slow attention written by hand, one head and one token at a time."""

import math
from types import SimpleNamespace

import pytest
import timm
import tiny_models
import torch
from timm.layers import apply_rot_embed_cat
from timm.models.vision_transformer import ResPostBlock
from torch.nn import functional as F

from sparc_loss.embeddings import surface_embeddings
from sparc_loss.embeddings.reading_names import READINGS
from sparc_loss.embeddings.readings import check_reading, read_as

VITS = ("ViT tok", "ViT avg", "timm ViT map", "timm ViT token", "Eva", "Eva PE")
OTHERS = ("value", "self", "clear")


def surfaced(vision: str):
    model = surface_embeddings(tiny_models.clip(vision), tiny_models.ToyTokenizer())
    return model.eval()


def last_block(visual):
    return visual.trunk.blocks[-1] if hasattr(visual, "trunk") else visual.transformer.resblocks[-1]


def parts(block) -> SimpleNamespace:
    """What the reference needs of a block, by the names of open_clip."""
    attention = block.attn
    if hasattr(block, "ln_1"):
        bias, out = attention.in_proj_bias, attention.out_proj
        return SimpleNamespace(
            norm=block.ln_1, weight=attention.in_proj_weight, bias=bias, out=out, scale=block.ls_1,
            feed_forward=lambda x: block.ls_2(block.mlp(block.ln_2(x))), normalised=(lambda q: q,) * 2,
        )  # fmt: skip
    weights = [attention.q_proj, attention.k_proj, attention.v_proj] if attention.qkv is None else [attention.qkv]
    weight = torch.cat([each.weight for each in weights])
    if getattr(attention, "q_bias", None) is not None:
        bias = torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])
    else:
        dimension = len(weight) // 3
        bias = torch.cat(
            [torch.zeros(dimension) if each.bias is None else each.bias for each in weights]
        )  # a key's bias may be missing
    gamma = [getattr(block, f"gamma_{number}", None) for number in (1, 2)]
    scales = [
        (lambda x, g=g: x if g is None else g * x) if hasattr(block, "gamma_1") else getattr(block, f"ls{number}")
        for number, g in zip((1, 2), gamma, strict=True)
    ]
    return SimpleNamespace(
        norm=block.norm1, weight=weight, bias=bias, out=lambda x: attention.proj(attention.norm(x)), scale=scales[0],
        feed_forward=lambda x: scales[1](block.mlp(block.norm2(x))), normalised=(attention.q_norm, attention.k_norm),
    )  # fmt: skip


def slow_reading(block, states, reading, rope):
    """The block's output [N, C] for one image's states [N, C]."""
    own = parts(block)
    heads = block.attn.num_heads
    queries, keys, values = (own.norm(states) @ own.weight.T + own.bias).chunk(3, dim=-1)
    size = queries.shape[1] // heads
    attended = torch.zeros_like(queries)
    for head in range(heads):
        columns = slice(head * size, (head + 1) * size)
        query, key = own.normalised[0](queries[:, columns]), own.normalised[1](keys[:, columns])
        if rope is not None:
            prefix = block.attn.num_prefix_tokens
            half = getattr(block.attn, "rotate_half", False)
            query, key = (
                torch.cat([each[:prefix], apply_rot_embed_cat(each[prefix:], rope, half=half)])
                for each in (query, key)
            )
        for token in range(len(states)):
            of_queries = torch.stack([query[token] @ other / math.sqrt(size) for other in query]).softmax(dim=0)
            of_keys = torch.stack([key[token] @ other / math.sqrt(size) for other in key]).softmax(dim=0)
            itself = F.one_hot(torch.tensor(token), len(states)).float()
            weights = {"value": itself, "self": of_queries + of_keys, "clear": of_queries}[reading]
            attended[token, columns] = sum(
                weight * value for weight, value in zip(weights, values[:, columns], strict=True)
            )
    output = own.scale(own.out(attended))
    if reading == "clear":
        return output
    return states + output + own.feed_forward(states + output)


def slow_patches(model, images, reading):
    """The tower's own forward, with the last block's output replaced by the slow reading of its input."""

    def replace(block, inputs, named, _):
        rope = named.get("rope")
        return torch.stack([slow_reading(block, states, reading, rope) for states in inputs[0]])

    handle = last_block(model.visual).register_forward_hook(replace, with_kwargs=True)
    try:
        return model.encode_patches(images)[0]
    finally:
        handle.remove()


@pytest.mark.parametrize("reading", OTHERS)
@pytest.mark.parametrize("vision", VITS)
@torch.no_grad()
def test_a_reading_equals_slow_attention(vision, reading):
    model = surfaced(vision)
    images = tiny_models.images_for(model)
    torch.testing.assert_close(
        model.encode_patches(images, reading=reading)[0], slow_patches(model, images, reading), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("reading", OTHERS)
@torch.no_grad()
def test_open_clips_block_with_norms_of_its_own(reading):
    options = {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True}
    config = {**tiny_models.VIT, "block_type": "custom", "ls_init_value": 0.3, **options}
    model = tiny_models._build(tiny_models.CLIP, tiny_models.EMBED_DIM, config, tiny_models.TRANSFORMER)
    surface_embeddings(model, tiny_models.ToyTokenizer()).eval()
    block, images = last_block(model.visual), tiny_models.images_for(model)
    captured = []
    handle = block.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    model.encode_patches(images)
    handle.remove()
    states, attention = captured[0], block.attn
    query, key, value = (
        each.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for each in F.linear(block.ln_1(states), attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)
    )
    query, key = attention.ln_q(query), attention.ln_k(key)

    def attend(one):
        return (one @ one.transpose(-1, -2) / math.sqrt(one.shape[-1])).softmax(dim=-1)

    attended = {"value": value, "self": (attend(query) + attend(key)) @ value, "clear": attend(query) @ value}[reading]
    merged = (attended * attention.head_scale).transpose(1, 2).flatten(2)
    expected = block.ls_1(block.ln_attn(attention.out_proj(attention.ln_inner(merged))))
    if reading != "clear":
        expected = states + expected
        expected = expected + block.ls_2(block.mlp(block.ln_2(expected)))
    with read_as(model.visual, reading):
        torch.testing.assert_close(block(states), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("vision", VITS)
@torch.no_grad()
def test_last_is_what_the_tower_gives_bit_for_bit(vision):
    model = surfaced(vision)
    images = tiny_models.images_for(model)
    _, expected, *_ = model.visual(images, with_embeddings=True)
    assert torch.equal(model.encode_patches(images, reading="last")[0], expected)
    assert torch.equal(model.encode_patches(images)[0], expected)


@torch.no_grad()
def test_the_block_is_its_own_again_afterwards_also_after_an_error():
    model = surfaced("ViT tok")
    images = tiny_models.images_for(model)
    before = model.encode_patches(images)[0]
    model.encode_patches(images, reading="clear")
    with pytest.raises(RuntimeError):
        model.encode_patches(images.double(), reading="self")
    assert "forward" not in vars(last_block(model.visual))
    assert torch.equal(model.encode_patches(images)[0], before)


@torch.no_grad()
def test_a_reading_also_works_with_gradient_checkpointing():
    model = surfaced("timm ViT token")
    images = tiny_models.images_for(model)
    expected = model.encode_patches(images, reading="self")[0]
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.encode_patches(images, reading="self")[0], expected)


@pytest.mark.parametrize(
    ("vision", "name"),
    [
        ("ModifiedResNet", "ModifiedResNet"),
        ("ConvNeXt", "ConvNeXt"),
        ("Swin", "SwinTransformer"),
        ("timm ViT relpos", "VisionTransformerRelPos"),
    ],
)
def test_a_tower_for_which_a_reading_has_no_meaning_is_refused_by_name(vision, name):
    model = surfaced(vision)
    with pytest.raises(TypeError) as error:
        model.encode_patches(tiny_models.images_for(model), reading="value")
    assert str(error.value) == (
        f"model.visual is a {name}, for which reading 'value' has no meaning; expected reading 'last', or open_clip's "
        "VisionTransformer or timm's VisionTransformer or Eva"
    )
    check_reading(model.visual, "last")


def test_a_last_block_of_another_kind_is_refused_by_name():
    model = surfaced("timm ViT token")
    model.visual.trunk.blocks[-1] = ResPostBlock(32, 2)
    with pytest.raises(TypeError, match=r"model\.visual is a tower whose last block is a ResPostBlock, for which"):
        check_reading(model.visual, "self")
    model.visual.trunk.blocks[-1] = timm.models.vision_transformer.Block(32, 2, attn_layer="diff")
    with pytest.raises(
        TypeError, match=r"model\.visual is a tower whose last attention is a DiffAttention, for which"
    ):
        check_reading(model.visual, "self")


def test_attention_by_cosine_is_refused_by_name():
    config = {**tiny_models.VIT, "block_type": "custom", "scaled_cosine_attn": True}
    model = tiny_models._build(tiny_models.CLIP, tiny_models.EMBED_DIM, config, tiny_models.TRANSFORMER)
    with pytest.raises(TypeError, match=r"model\.visual is a tower whose last attention is by cosine, for which"):
        check_reading(model.visual, "self")


def test_an_unknown_reading_is_refused():
    model = surfaced("ViT tok")
    with pytest.raises(ValueError, match="reading is 'first'; expected one of 'last', 'value', 'self', 'clear'"):
        model.encode_patches(tiny_models.images_for(model), reading="first")
    assert set(READINGS) == {"last", *OTHERS}
