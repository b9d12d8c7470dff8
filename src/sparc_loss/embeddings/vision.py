"""Patch embeddings of open_clip's vision towers, from the same pass as the pooled feature.

A patch embedding is the pooled feature that the tower would compute from this patch alone: the tower's own final norm,
pooling and projection, without new parameters. One function per kind of tower, each mirroring that tower's forward in
open_clip/transformer.py, open_clip/modified_resnet.py or open_clip/timm_model.py; the tests hold what the tower
itself returns to it bit for bit.
"""

import math
from typing import Any

from einops import rearrange
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from open_clip.utils import to_2tuple
from timm.layers import AttentionPoolLatent, HybridEmbed
from timm.models import ConvNeXt, Eva, FastVit, SwinTransformer, VisionTransformerRelPos
from timm.models import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

try:
    from timm.models import NaFlexVit
except ImportError:  # timm before 1.0.16
    NaFlexVit = ()  # type: ignore[assignment, misc]

Images = Tensor | dict[str, Any]
"""Images [B, 3, H, W]; or NaFlex patches, as open_clip_train's collator has them, of images of any size: patches
[B, P, values of a patch], patch_coord [B, P, 2] (row, column), and patch_valid bool [B, P], False for padding."""
SEQUENCE_TRUNKS = (TimmVisionTransformer, VisionTransformerRelPos, Eva)  # [B, tokens, C], prefix tokens first
MAP_TRUNKS = (ConvNeXt, FastVit, SwinTransformer)  # [B, C, H, W], or [B, H, W, C] if output_fmt says NHWC


Passed = tuple[Any, Tensor, tuple[int, int] | None, Tensor | None]


def forward_with_patches(visual: Any, images: Any) -> Passed:
    """One pass of the tower over images [B, 3, H, W], or over NaFlex patches where the tower is a NaFlexVit.

    Returns:
        What `visual(images)` returns: the pooled feature [B, D], or it and CoCa's image tokens.
        The patch embeddings [B, P, D], row by row over the grid; class and register tokens are left out.
        The grid's (height, width); None for NaFlex patches, whose places patch_coord gives. With patch dropout in
        training mode, P is the number of patches kept of height * width, in the order in which they were drawn.
        False for padding, bool [B, P], for NaFlex patches; None if all patches are valid.
    """
    if isinstance(visual, TimmModel) and isinstance(visual.trunk, NaFlexVit):
        return _timm_naflex(visual, images)
    if isinstance(visual, VisionTransformer):
        return *_vision_transformer(visual, images), None
    if isinstance(visual, ModifiedResNet):
        return *_modified_resnet(visual, images), None
    if isinstance(visual.trunk, SEQUENCE_TRUNKS):
        return *_timm_sequence(visual, images), None
    return *_timm_map(visual, images), None


def patch_size(visual: Any, size: tuple[int, int], grid: tuple[int, int]) -> tuple[float, float]:
    """Height and width of a patch in pixels of the tower's input; the grid of patches starts at the top left corner.

    If the image is not a multiple of the patch, a tower ignores the last pixels at the right and at the bottom (ViT),
    or its last patches extend beyond them (FastViT, which pads).

    Args:
        visual: the tower. An unknown one without a `patch_size` is assumed to divide its input evenly.
        size: height and width of the input in pixels.
        grid: height and width of the grid, as `encode_patches` returns it.
    """
    trunk = getattr(visual, "trunk", visual)
    embedding = getattr(trunk, "patch_embed", getattr(trunk, "embeds", trunk))
    evenly = size[0] / grid[0], size[1] / grid[1]
    if isinstance(visual, ModifiedResNet):
        return 32, 32
    if isinstance(trunk, MAP_TRUNKS):
        return to_2tuple(trunk.feature_info[-1]["reduction"])
    if isinstance(embedding, HybridEmbed):
        # Its convolutions halve the image a few times; timm only divides the image's size by the grid's.
        height, width = (float(2 ** round(math.log2(side))) for side in evenly)
        return height, width
    return to_2tuple(getattr(embedding, "patch_size", None) or evenly)


def patch_extent(visual: Any, size: tuple[int, int], grid: tuple[int, int]) -> tuple[float, float]:
    """The share of an image's height and width that the grid of patches covers, from the top left corner.

    Above 1 if the last patches extend beyond the image. Arguments as in `patch_size`.
    """
    height, width = patch_size(visual, size, grid)
    return grid[0] * height / size[0], grid[1] * width / size[1]


def check_vision_tower(visual: Any) -> None:
    """Raise TypeError, naming the tower, unless its patch embeddings are known."""
    unknown = _unknown_tower(visual)
    if unknown is not None:
        trunks = ", ".join([*(trunk.__name__ for trunk in SEQUENCE_TRUNKS + MAP_TRUNKS), "NaFlexVit"])
        raise TypeError(
            f"model.visual is a {unknown}; patch embeddings are known for open_clip's VisionTransformer (pool_type "
            f"'tok' or 'avg', attentional_pool true or false), ModifiedResNet, and timm's {trunks}"
        )


def _unknown_tower(visual: Any) -> str | None:
    if isinstance(visual, ModifiedResNet):
        return None
    if isinstance(visual, VisionTransformer):
        if visual.attn_pool is not None and visual.attn_pool_contrastive is not None:
            return f"VisionTransformer with attentional_pool {visual.attn_pool_type!r}"
        return None if visual.pool_type in ("tok", "avg") else f"VisionTransformer with pool_type {visual.pool_type!r}"
    if not isinstance(visual, TimmModel):
        return type(visual).__name__
    if not isinstance(visual.trunk, (*SEQUENCE_TRUNKS, *MAP_TRUNKS, NaFlexVit)):
        return f"TimmModel with a {type(visual.trunk).__name__} trunk"
    if hasattr(visual.head, "pool"):
        return f"TimmModel with a {type(visual.head.pool).__name__} of its own"
    pool = getattr(visual.trunk, "attn_pool", None)
    if pool is not None and (not isinstance(pool, AttentionPoolLatent) or pool.pos_embed is not None):
        return f"TimmModel with a {type(pool).__name__} that knows positions"
    return None


def _vision_transformer(visual: VisionTransformer, images: Tensor) -> tuple[Any, Tensor, tuple[int, int]]:
    states = visual.transformer(visual._embeds(images))
    pooled, tokens = visual._pool(states)
    patches = states[:, 1:]
    if visual.attn_pool is not None:
        patches = visual.ln_post(_attend_to_itself(visual.attn_pool.attn, visual.attn_pool.ln_k(patches)))
    elif visual.final_ln_after_pool:
        patches = visual.ln_post(patches)
    else:
        patches = tokens  # normalised before pooling
    if visual.proj is not None:
        pooled, patches = pooled @ visual.proj, patches @ visual.proj
    (height, width), (patch_height, patch_width) = images.shape[-2:], visual.patch_size
    return (
        (pooled, tokens) if visual.output_tokens else pooled,
        patches,
        (height // patch_height, width // patch_width),
    )


def _attend_to_itself(attention: nn.MultiheadAttention, keys: Tensor) -> Tensor:
    # The softmax over a single key is 1, so any query gets that key's value.
    weight = attention.v_proj_weight if attention.in_proj_weight is None else attention.in_proj_weight.chunk(3)[2]
    return attention.out_proj(F.linear(keys, weight, attention.in_proj_bias.chunk(3)[2]))


def _modified_resnet(visual: ModifiedResNet, images: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    features = visual.stem(images)
    for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        features = layer(features)
    # Attention over a single place is its value. The positional embedding is left out: every patch is alone.
    patches = visual.attnpool.v_proj(rearrange(features, "b c h w -> b (h w) c"))
    return visual.attnpool(features), visual.attnpool.c_proj(patches), tuple(features.shape[-2:])


def _timm_sequence(visual: TimmModel, images: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    trunk = visual.trunk
    states = trunk.forward_features(images)
    pooled = visual.head(trunk.forward_head(states))
    return pooled, _each_pooled(visual, states), tuple(trunk.patch_embed.dynamic_feat_size(images.shape[-2:]))


def _timm_naflex(visual: TimmModel, images: Images) -> Passed:
    trunk = visual.trunk
    if not isinstance(images, dict):
        states = trunk.forward_features(images)
        pooled = visual.head(trunk.forward_head(states))
        return pooled, _each_pooled(visual, states), tuple(trunk.embeds.dynamic_feat_size(images.shape[-2:])), None
    inputs = ("patches", "patch_coord", "patch_valid", "attn_mask")
    features = trunk.forward_features(**{name: images[name] for name in inputs if name in images})
    pooled = visual.head(trunk.forward_head(**features))
    return pooled, _each_pooled(visual, features["patches"]), None, features["patch_valid"]


def _each_pooled(visual: TimmModel, states: Tensor) -> Tensor:
    """The patches among a trunk's states [B, tokens, C], each alone through its pool and head, [B, P, D]."""
    trunk = visual.trunk
    patches = states[:, trunk.num_prefix_tokens :]
    if getattr(trunk, "attn_pool", None) is not None:
        batch = len(patches)
        patches = trunk.attn_pool(rearrange(patches, "b p c -> (b p) 1 c"))
        patches = rearrange(patches, "(b p) c -> b p c", b=batch)
    return visual.head(trunk.head(trunk.head_drop(trunk.fc_norm(patches))))


def _timm_map(visual: TimmModel, images: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    trunk = visual.trunk
    features = trunk.forward_features(images)
    pooled = visual.head(trunk.forward_head(features))
    channels_last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
    batch, *grid = features.shape[:3] if channels_last else features[:, 0].shape
    to_maps_of_one_place = "b h w c -> (b h w) 1 1 c" if channels_last else "b c h w -> (b h w) c 1 1"
    patches = visual.head(trunk.forward_head(rearrange(features, to_maps_of_one_place)))
    return pooled, rearrange(patches, "(b p) d -> b p d", b=batch), tuple(grid)
