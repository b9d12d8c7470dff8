"""Masks of patches and tokens: which are valid, and which patches a token may use."""

import torch
from einops import rearrange
from torch import Tensor

from sparc_loss._checks import check_mask


def zero_where_masked(features: Tensor, mask: Tensor | None) -> Tensor:
    """Features [B, N, D] with zeros where `mask`, bool [B, N], is False; unchanged where it is None."""
    return features if mask is None else features.masked_fill(~rearrange(mask, "b n -> b n 1"), 0)


def valid_tokens(
    token_features: Tensor,
    patch_features: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None = None,
    region_mask: Tensor | None = None,
) -> Tensor:
    """The tokens over which the loss is a mean: those of `token_mask` that may use at least one patch, bool [B, L].

    Raises:
        TypeError: a mask not bool.
        ValueError: wrong shapes or devices.
    """
    check_mask("token_mask", token_mask, token_features.shape[:2], "b l", token_features.device)
    if patch_mask is None and region_mask is None:
        return token_mask
    shape = torch.Size((*token_features.shape[:2], patch_features.shape[1]))
    return token_mask & usable_patches(shape, token_features.device, patch_mask, region_mask).any(dim=-1)


def usable_patches(
    shape: torch.Size, device: torch.device, patch_mask: Tensor | None, region_mask: Tensor | None
) -> Tensor:
    """The patches that each token may use: both masks together, bool [B, L, P] of the given shape.

    Raises:
        TypeError: a mask not bool.
        ValueError: wrong shapes or devices.
    """
    batch, _, patches = shape
    usable = torch.ones(shape, dtype=torch.bool, device=device)
    if patch_mask is not None:
        check_mask("patch_mask", patch_mask, (batch, patches), "b p", device)
        usable = usable & rearrange(patch_mask, "b p -> b 1 p")
    if region_mask is not None:
        check_mask("region_mask", region_mask, shape, "b l p", device)
        usable = usable & region_mask
    return usable
