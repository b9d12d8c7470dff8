"""Readings of a ViT's last block: what its patches are, for evaluation. Training always uses the block's own output.

CLIP trains the class token. What the last block writes into the patches was never trained, and the readings published
for segmentation without training replace it:

    last    the block's own output
    value   every token attends to itself alone (MaskCLIP, arXiv 2112.01071, as ClearCLIP's tables have it)
    self    softmax(q q^T) + softmax(k k^T) in place of softmax(q k^T) (SCLIP, arXiv 2312.01597)
    clear   softmax(q q^T), the attention's output alone: no residual, no feed-forward (ClearCLIP, arXiv 2407.12442)

The products are those of the block's own heads, scale, norms and rotary embeddings. They are known for open_clip's
VisionTransformer and timm's VisionTransformer and Eva.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from open_clip.timm_model import TimmModel
from open_clip.transformer import Attention, CustomResidualAttentionBlock, ResidualAttentionBlock, VisionTransformer
from timm.layers import Attention as TimmAttention
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models import Eva
from timm.models import VisionTransformer as TimmVisionTransformer
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn
from torch.nn import functional as F

from sparc_loss._checks import check_choice
from sparc_loss.embeddings.reading_names import READINGS, Reading
from sparc_loss.embeddings.towers import tower_name

_BLOCKS = (ResidualAttentionBlock, CustomResidualAttentionBlock, TimmBlock, EvaBlock)
_ATTENTIONS = (nn.MultiheadAttention, Attention, TimmAttention, EvaAttention, AttentionRope)


@contextmanager
def read_as(visual: Any, reading: Reading) -> Iterator[None]:
    """Within the context, the tower's last block gives its patches as `reading` says.

    Raises:
        ValueError: an unknown reading.
        TypeError: a tower for which it has no meaning, by name.
    """
    check_reading(visual, reading)
    if reading == "last":
        yield
        return
    block = _last_block(visual)

    def forward(states: Tensor, *_: None, rope: Tensor | None = None, **__: Any) -> Tensor:
        return _read(block, states, reading, rope)

    block.forward = forward  # before the class's own method, for this one object
    try:
        yield
    finally:
        del block.forward


def check_reading(visual: Any, reading: str) -> None:
    """Raise ValueError for an unknown reading, TypeError, by name, for a tower for which it has no meaning."""
    check_choice("reading", reading, READINGS)
    if reading == "last":
        return
    block = _last_block(visual)
    problem = None
    if block is None:
        problem = f"a {tower_name(visual)}"
    elif not isinstance(block, _BLOCKS):
        problem = f"a tower whose last block is a {type(block).__name__}"
    elif not isinstance(block.attn, _ATTENTIONS):
        problem = f"a tower whose last attention is a {type(block.attn).__name__}"
    elif getattr(block.attn, "logit_scale", None) is not None:
        problem = "a tower whose last attention is by cosine"
    elif getattr(block.attn, "num_kv_groups", 1) > 1:
        problem = "a tower whose last attention shares keys between heads"
    if problem is not None:
        raise TypeError(
            f"model.visual is {problem}, for which reading {reading!r} has no meaning; expected reading 'last', or "
            "open_clip's VisionTransformer or timm's VisionTransformer or Eva"
        )


def _last_block(visual: Any) -> Any:
    if isinstance(visual, VisionTransformer):
        return visual.transformer.resblocks[-1]
    if isinstance(visual, TimmModel) and isinstance(visual.trunk, (TimmVisionTransformer, Eva)):
        return visual.trunk.blocks[-1]
    return None


def _read(block: Any, states: Tensor, reading: str, rope: Tensor | None) -> Tensor:
    """The block's output [B, N, C] for its input [B, N, C], class token included."""
    of_timm = not hasattr(block, "ln_1")
    attended = _attend(block.attn, (block.norm1 if of_timm else block.ln_1)(states), reading, rope)
    if of_timm:
        attended = _scaled(block, "1", attended)
    else:
        attended = block.ls_1(getattr(block, "ln_attn", nn.Identity())(attended))
    if reading == "clear":
        return attended
    states = states + attended
    if of_timm:
        return states + _scaled(block, "2", block.mlp(block.norm2(states)))
    return states + block.ls_2(block.mlp(block.ln_2(states)))


def _scaled(block: Any, number: str, branch: Tensor) -> Tensor:
    """By timm's layer scale, which is a module in a Block and a parameter in an EvaBlock."""
    if isinstance(block, EvaBlock):
        gamma = getattr(block, f"gamma_{number}")
        return branch if gamma is None else gamma * branch
    scaled: Tensor = getattr(block, f"ls{number}")(branch)
    return scaled


def _attend(attention: Any, inputs: Tensor, reading: str, rope: Tensor | None) -> Tensor:
    query, key, value = _heads(attention, inputs, rope)
    scale = query.shape[-1] ** -0.5

    def weights(states: Tensor) -> Tensor:
        return (states @ states.transpose(-1, -2) * scale).softmax(dim=-1)

    if reading == "value":
        attended = value
    elif reading == "self":
        attended = (weights(query) + weights(key)) @ value
    else:
        attended = weights(query) @ value
    if getattr(attention, "head_scale", None) is not None:  # open_clip's
        attended = attended * attention.head_scale
    attended = rearrange(attended, "b h n d -> b n (h d)")
    if isinstance(attention, (nn.MultiheadAttention, Attention)):
        attended = getattr(attention, "ln_inner", nn.Identity())(attended)
        return attention.out_proj(attended)
    attended = attention.norm(attended)
    gate = getattr(attention, "gate", None)
    return attention.proj(attended if gate is None else attended * gate(inputs).sigmoid())


def _heads(attention: Any, inputs: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, heads, N, d], as the attention multiplies them."""

    def split(states: Tensor) -> Tensor:
        return rearrange(states, "b n (h d) -> b h n d", h=attention.num_heads)

    if isinstance(attention, (nn.MultiheadAttention, Attention)):
        packed = F.linear(inputs, attention.in_proj_weight, attention.in_proj_bias)
        query, key, value = map(split, packed.chunk(3, dim=-1))
        unchanged = nn.Identity()
        return getattr(attention, "ln_q", unchanged)(query), getattr(attention, "ln_k", unchanged)(key), value
    if attention.qkv is None:
        query, key, value = (
            split(project(inputs)) for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
    else:
        packed = attention.qkv(inputs)
        if getattr(attention, "q_bias", None) is not None:  # Eva's stand apart from the layer
            packed = packed + torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
        query, key, value = map(split, packed.chunk(3, dim=-1))
    query, key = attention.q_norm(query), attention.k_norm(key)
    if rope is not None:
        prefix, half = attention.num_prefix_tokens, getattr(attention, "rotate_half", False)
        query, key = (
            torch.cat(
                (states[:, :, :prefix], apply_rot_embed_cat(states[:, :, prefix:], rope, half=half)), dim=2
            ).type_as(value)
            for states in (query, key)
        )
    return query, key, value
