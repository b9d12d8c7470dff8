"""Diagnostics of the alignment of words and patches in training: three numbers in [0, 1], to be logged.

They are not part of the loss and have no gradient. They are computed with `functional`, on some of the pairs.
"""

import torch
from torch import Tensor

from sparc_loss._arithmetic import l2_normalised
from sparc_loss._checks import check_features, check_mask, check_whole_number
from sparc_loss._masks import usable_patches, valid_tokens, zero_where_masked
from sparc_loss._nearest import own_is_nearest
from sparc_loss.functional import (
    Alignment,
    alignment_weights,
    language_grouped_embeddings,
    token_patch_similarity,
)

DIAGNOSED_PAIRS = 64  # [64, 77, 576] similarities are 11 MB
NAMES = ("fine_grained_accuracy", "patches_kept", "alignment_entropy")


@torch.no_grad()
def alignment_diagnostics(
    patch_features: Tensor,
    token_features: Tensor,
    token_mask: Tensor,
    *,
    threshold: float | None = None,
    alignment: Alignment = "sparse",
    patch_mask: Tensor | None = None,
    region_mask: Tensor | None = None,
    pairs: int = DIAGNOSED_PAIRS,
) -> dict[str, Tensor]:
    """Diagnostics of the first `pairs` pairs of a batch, each a mean over their valid tokens.

    Args:
        patch_features: [B, P, D], not normalised.
        token_features: [B, L, D], not normalised.
        token_mask: bool [B, L], True for valid tokens.
        threshold: sigma of Eq. 3, in [0, 1]; None is 1/P.
        alignment: "sparse", "dense" or "softmax", see `functional.alignment_weights`.
        patch_mask: bool [B, P], False for padding patches.
        region_mask: bool [B, L, P], True for the patches a token may use.
        pairs: number of pairs to use; it bounds the cost, which is that of the eager loss on these pairs.

    Returns:
        Scalars of float32 (float64 if a feature is), detached; all 0 without a valid token:
        fine_grained_accuracy: share of the tokens whose own group of patches is the nearest among the caption's
            groups, by cosine, averaged with the share of the groups whose own token is the nearest among the caption's
            tokens. A tie is a miss. Chance is 1 over the number of the caption's tokens.
        patches_kept: share of the usable patches with a weight above zero after Eqs. 2 and 3.
        alignment_entropy: entropy of the weights of Eq. 4 over that of equal weights: 0 if one patch has all weight,
            1 if all have the same. 0 where only one patch is usable.

    Raises:
        TypeError, ValueError: as `functional.fine_grained_loss`.
    """
    check_features("b p d, b l d", patch_features=patch_features, token_features=token_features)
    sizes, patches = token_features.shape[:2], patch_features.shape[1]
    check_mask("token_mask", token_mask, sizes, "b l", token_features.device)
    if patch_mask is not None:
        check_mask("patch_mask", patch_mask, (sizes[0], patches), "b p", token_features.device)
    if region_mask is not None:
        check_mask("region_mask", region_mask, (*sizes, patches), "b l p", token_features.device)
    check_whole_number("pairs", pairs, 1)
    patch_features, token_features, token_mask = patch_features[:pairs], token_features[:pairs], token_mask[:pairs]
    patch_mask = None if patch_mask is None else patch_mask[:pairs]
    region_mask = None if region_mask is None else region_mask[:pairs]
    valid = valid_tokens(token_features, patch_features, token_mask, patch_mask, region_mask)
    patch_features = zero_where_masked(patch_features, patch_mask)
    token_features = zero_where_masked(token_features, valid)
    similarity = token_patch_similarity(token_features, patch_features)
    weights = alignment_weights(similarity, threshold, alignment, patch_mask, region_mask)
    usable = usable_patches(weights.shape, weights.device, patch_mask, region_mask).sum(dim=-1).to(weights.dtype)
    grouped = language_grouped_embeddings(weights, patch_features)

    kept = (weights > 0).sum(dim=-1) / usable.clamp(min=1)
    entropy = torch.special.entr(weights).sum(dim=-1) / usable.clamp(min=2).log()
    cosine = token_patch_similarity(l2_normalised(grouped), l2_normalised(token_features))  # of groups and tokens
    found = torch.stack([own_is_nearest(each, valid) for each in (cosine, cosine.mT)]).float().mean(dim=0)
    number = valid.sum().clamp(min=1)
    return {
        name: value.to(weights.dtype).where(valid, 0).sum() / number
        for name, value in zip(NAMES, (found, kept, entropy), strict=True)
    }
