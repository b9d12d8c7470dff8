"""Patch embeddings of open_clip's vision towers, from the same pass as the pooled feature.

A patch embedding is what the tower's pooled feature would be if the image were that one patch: the tower's own final
norm and projection, no new parameter. One function per kind of tower, each mirroring that tower's forward in
open_clip/transformer.py or open_clip/timm_model.py; the tests hold the pooled feature to it bit for bit.
"""

from einops import rearrange
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.models import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn


def encode_pooled_and_patches(visual: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """One pass of the tower: pooled feature [B, D], as `visual(images)` gives it, and patch embeddings [B, P, D].

    Patches go row by row over the grid; class and register tokens are left out. With patch dropout P is what is left.
    """
    if isinstance(visual, VisionTransformer):
        return _vision_transformer(visual, images)
    return _timm_vision_transformer(visual, images)


def patch_grid(visual: nn.Module, images: Tensor) -> tuple[int, int]:
    """Height and width, in patches, of the grid into which the tower cuts these images."""
    height, width = images.shape[-2:]
    if isinstance(visual, VisionTransformer):
        return height // visual.patch_size[0], width // visual.patch_size[1]
    return visual.trunk.patch_embed.dynamic_feat_size((height, width))


def check_vision_tower(visual: nn.Module) -> None:
    """Raise TypeError, naming the tower, unless its patch embeddings are known."""
    if isinstance(visual, VisionTransformer):
        if visual.attn_pool is None and visual.pool_type in ("tok", "avg"):
            return
        found = f"VisionTransformer with pool_type {visual.pool_type!r}"
        if visual.attn_pool is not None:
            found = "VisionTransformer with an attentional pooler"
    elif isinstance(visual, TimmModel):
        if isinstance(visual.trunk, TimmVisionTransformer):
            return
        found = f"TimmModel with a {type(visual.trunk).__name__} trunk"
    else:
        found = type(visual).__name__
    raise TypeError(
        f"model.visual is a {found}; patch embeddings are known for open_clip's VisionTransformer "
        "with 'tok' or 'avg' pooling and for timm's VisionTransformer"
    )


def _vision_transformer(visual: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    pooled, patches = visual._pool(visual.transformer(visual._embeds(images)))
    if visual.final_ln_after_pool:
        patches = visual.ln_post(patches)
    if visual.proj is not None:
        pooled, patches = pooled @ visual.proj, patches @ visual.proj
    return pooled, patches


def _timm_vision_transformer(visual: TimmModel, images: Tensor) -> tuple[Tensor, Tensor]:
    trunk = visual.trunk
    tokens = trunk.forward_features(images)
    pooled = visual.head(trunk.forward_head(tokens))
    patches = tokens[:, trunk.num_prefix_tokens :]
    if trunk.attn_pool is not None:
        # Attention over a single patch: its value, projected. Every patch pools itself alone.
        batch = len(patches)
        patches = trunk.attn_pool(rearrange(patches, "b p c -> (b p) 1 c"))
        patches = rearrange(patches, "(b p) c -> b p c", b=batch)
    patches = visual.head(trunk.head(trunk.head_drop(trunk.fc_norm(patches))))
    return pooled, patches
