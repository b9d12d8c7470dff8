"""What the alignment of words and patches does during training: three numbers between 0 and 1, to be logged.

They are no part of the loss: nothing here has a gradient. They are computed with `functional`, on some of the pairs.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from sparc_loss.functional import (
    Alignment,
    alignment_weights,
    countable_tokens,
    language_grouped_embeddings,
    token_patch_similarity,
    usable_patches,
    zero_where_masked,
)

PAIRS = 64  # of [64, 77, 576] similarities, 11 MB
NAMES = ("fine_grained_accuracy", "patches_kept", "alignment_entropy")


@torch.no_grad()
def alignment_metrics(
    patch_features: Tensor,
    token_features: Tensor,
    token_mask: Tensor,
    *,
    threshold: float | None = None,
    alignment: Alignment = "sparse",
    patch_mask: Tensor | None = None,
    region_mask: Tensor | None = None,
    pairs: int = PAIRS,
) -> dict[str, Tensor]:
    """Metrics of the first `pairs` pairs of a batch, each a mean over their tokens that count.

    Args:
        patch_features: [B, P, D], not normalised.
        token_features: [B, L, D], not normalised.
        token_mask: bool [B, L], True for the tokens that count.
        threshold: sigma of Eq. 3, in [0, 1]; None is 1/P.
        alignment: "sparse", "dense" or "softmax", see `functional.alignment_weights`.
        patch_mask: bool [B, P], False for padding patches.
        region_mask: bool [B, L, P], True for the patches a token may use.
        pairs: how many pairs to look at; a bound on the cost, which else would be that of the plain loss.

    Returns:
        Scalars of float32 (float64 if a feature is), detached; all 0 where no token counts:
        fine_grained_accuracy: how often a token's own group of patches is its nearest among its caption's groups, and
            it the group's nearest among the caption's tokens (by cosine, the mean of both ways). 1 over the number of
            a caption's tokens is chance. A tie is won by the first.
        patches_kept: share of the usable patches that have a weight, that is which Eqs. 2 and 3 leave.
        alignment_entropy: of the weights of Eq. 4, over that of equal weights: 0 if one patch has all, 1 if all have
            the same. 0 where only one patch is usable.

    Raises:
        TypeError, ValueError: as `functional.fine_grained_loss`.
    """
    patch_features, token_features, token_mask = patch_features[:pairs], token_features[:pairs], token_mask[:pairs]
    patch_mask = None if patch_mask is None else patch_mask[:pairs]
    region_mask = None if region_mask is None else region_mask[:pairs]
    counts = countable_tokens(token_features, patch_features, token_mask, patch_mask, region_mask)
    patch_features = zero_where_masked(patch_features, patch_mask)
    token_features = zero_where_masked(token_features, counts)
    similarity = token_patch_similarity(token_features, patch_features)
    weights = alignment_weights(similarity, threshold, alignment, patch_mask, region_mask)
    usable = usable_patches(weights.shape, weights.device, patch_mask, region_mask).sum(dim=-1).to(weights.dtype)
    grouped = language_grouped_embeddings(weights, patch_features)

    kept = (weights > 0).sum(dim=-1) / usable.clamp(min=1)
    entropy = torch.special.entr(weights).sum(dim=-1) / usable.clamp(min=2).log()
    values = (_nearest_is_own(grouped, token_features, counts), kept, entropy)
    number = counts.sum().clamp(min=1)
    return {
        name: value.to(weights.dtype).where(counts, 0).sum() / number
        for name, value in zip(NAMES, values, strict=True)
    }


def _nearest_is_own(grouped: Tensor, token_features: Tensor, counts: Tensor) -> Tensor:
    """Of both ways, the share in which a token and its own group are each other's nearest, [B, L]."""
    unit = [F.normalize(features.to(grouped.dtype), dim=-1) for features in (grouped, token_features)]
    cosine = token_patch_similarity(*unit)  # the same inner products, of groups and tokens
    both_count = counts[:, :, None] & counts[:, None, :]
    cosine = cosine.masked_fill(~both_count, -torch.inf)
    own = torch.arange(cosine.shape[-1], device=cosine.device)
    return ((cosine.argmax(dim=-1) == own).to(grouped.dtype) + (cosine.argmax(dim=-2) == own)) / 2
