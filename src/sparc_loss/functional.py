"""SPARC's objective, one small function per equation (arXiv 2401.09865), and a contrast with other images beside it.

This file is the reference implementation: plain PyTorch, differentiable to any order. The tests hold every faster
implementation to it.

Letters, here and everywhere: B image-text pairs, P patches of an image, L tokens of a caption, D dimensions of the
space that images and texts share. All arithmetic is in float32 at least, whatever the autocast: in bfloat16 the
arg-min of Eq. 2 changes and the gradient has an error of 10 %. Float64 stays float64.

Finite features give a finite loss as long as their products fit into float32 (magnitudes from about 1e-18 to 1e18).
NaN or infinity in a valid patch or token makes the loss NaN. The values of masked patches and tokens have no effect,
and their gradient is zero.
"""

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from sparc_loss._arithmetic import full_precision, l2_normalised, product
from sparc_loss._checks import (
    check_choice,
    check_features,
    check_mask,
    check_number,
    check_scale,
    check_whole_number,
)
from sparc_loss._masks import usable_patches, valid_tokens, zero_where_masked

Alignment = Literal["sparse", "dense", "softmax"]
Reduction = Literal["token", "sample"]
Direction = Literal["text_to_image", "both"]

ALIGNMENTS: tuple[Alignment, ...] = ("sparse", "dense", "softmax")
REDUCTIONS: tuple[Reduction, ...] = ("token", "sample")
DIRECTIONS: tuple[Direction, ...] = ("text_to_image", "both")


@dataclass(frozen=True)
class AlignmentSettings:
    """The settings of the fine-grained loss, checked.

    Attributes:
        threshold: sigma of Eq. 3, in [0, 1]; None is 1/P.
        alignment: "sparse", "dense" or "softmax", see `alignment_weights`.
        reduction: "token" or "sample", see `sequence_contrastive_loss`.

    Raises:
        TypeError: a threshold that is not a number.
        ValueError: a threshold outside [0, 1], an unknown alignment or reduction.
    """

    threshold: float | None = None
    alignment: Alignment = "sparse"
    reduction: Reduction = "token"

    def __post_init__(self) -> None:
        if self.threshold is not None:
            check_number("threshold", self.threshold, 0, 1)
        check_choice("alignment", self.alignment, ALIGNMENTS)
        check_choice("reduction", self.reduction, REDUCTIONS)


def token_patch_similarity(token_features: Tensor, patch_features: Tensor) -> Tensor:
    """Inner product of every token with every patch of its image: s_lp = t_l . v_p (Eq. 2).

    Shape:
        token_features: [B, L, D], not normalised.
        patch_features: [B, P, D], not normalised.
        Returns [B, L, P], float32 (float64 if an input is).

    Raises:
        TypeError: features that are not floating-point tensors.
        ValueError: wrong rank, B or D that disagree, different devices.
    """
    check_features("b l d, b p d", token_features=token_features, patch_features=patch_features)
    return product(token_features, patch_features, "b l d, b p d -> b l p")


def alignment_weights(
    similarity: Tensor,
    threshold: float | None = None,
    alignment: Alignment = "sparse",
    patch_mask: Tensor | None = None,
    region_mask: Tensor | None = None,
    *,
    method: Alignment | None = None,
) -> Tensor:
    """The weight of each patch for each token: a_lp (Eqs. 2-4). Rows are non-negative and sum to one.

    The similarities of each token are min-max normalised over its patches (Eq. 2). Those below `threshold` become
    zero (Eq. 3), and the rest is divided by its sum (Eq. 4). If all patches are equally similar to a token, it gives
    each the same weight, and no gradient flows through these weights.

    Args:
        similarity: [B, L, P], from `token_patch_similarity`.
        threshold: sigma of Eq. 3, in [0, 1]; None is the paper's 1/P, with P the number of patches the token may use.
        alignment: "sparse" (the paper), "dense" (without Eq. 3) or "softmax" (softmax over patches, not Eqs. 2-4).
        patch_mask: bool [B, P], False for the padding of variable-resolution images.
        region_mask: bool [B, L, P], True for the patches that a token may use.
        method: the old name of `alignment`; deprecated.

    Returns:
        [B, L, P] of similarity's dtype, at least float32. A token that may use no patch has a row of zeros.

    Raises:
        TypeError: similarity not floating point, a mask not bool, a threshold that is not a number.
        ValueError: wrong shapes or devices, a threshold outside [0, 1], an unknown alignment.
    """
    if method is not None:
        warnings.warn("alignment_weights(method=...) is now alignment=...", DeprecationWarning, stacklevel=2)
        alignment = method
    check_features("b l p", similarity=similarity)
    check_choice("alignment", alignment, ALIGNMENTS)
    if threshold is not None:
        check_number("threshold", threshold, 0, 1)
    similarity = full_precision(similarity)
    usable = usable_patches(similarity.shape, similarity.device, patch_mask, region_mask)
    # A row without a usable patch is computed with all patches and zeroed at the end, so that the gradient has no 0/0.
    candidate = usable | ~usable.any(dim=-1, keepdim=True)
    # An infinite similarity of an unusable patch would make 0 * inf in the gradient.
    similarity = similarity.masked_fill(~usable, 0)

    if alignment == "softmax":
        weights = similarity.masked_fill(~candidate, -torch.inf).softmax(dim=-1)
    else:
        weights = _min_max_normalised(similarity, candidate)
        if alignment == "sparse":
            # In similarity's dtype: 1/3 rounded to float32 is larger than 1/3 in float64.
            number = candidate.sum(dim=-1, keepdim=True, dtype=similarity.dtype)
            sigma = 1 / number if threshold is None else threshold
            weights = weights.where(weights >= sigma, 0)
        weights = weights.masked_fill(~candidate, 0)
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.masked_fill(~usable, 0)


def language_grouped_embeddings(weights: Tensor, patch_features: Tensor) -> Tensor:
    """The patches of each token, summed by its weights: c_l = sum_p a_lp v_p (Eq. 5).

    Shape:
        weights: [B, L, P], from `alignment_weights`.
        patch_features: [B, P, D].
        Returns [B, L, D], float32 (float64 if an input is).

    Raises:
        TypeError: inputs that are not floating-point tensors.
        ValueError: wrong rank, B or P that disagree, different devices.
    """
    check_features("b l p, b p d", weights=weights, patch_features=patch_features)
    return product(weights, patch_features, "b l p, b p d -> b l d")


def sequence_contrastive_loss(
    grouped: Tensor,
    token_features: Tensor,
    token_mask: Tensor,
    logit_scale: Tensor | float,
    reduction: Reduction = "token",
) -> Tensor:
    """Contrast of every token with its own group of patches against the other tokens of its caption (Eq. 6).

    Symmetric cross-entropy over cos(c_j, t_k) * logit_scale within each pair, with target k = j. Masked tokens are
    excluded from the softmax and from the mean. A zero vector has cosine 0 with every vector.

    Args:
        grouped: [B, L, D], from `language_grouped_embeddings`.
        token_features: [B, L, D].
        token_mask: bool [B, L], True for valid tokens; they need not be contiguous, and a caption may have none.
        logit_scale: 1/tau, a number or a tensor of one element.
        reduction: "token" is the mean over all valid tokens of the batch (Listing 1); "sample" is the mean over the
            tokens of each caption and then over the B captions, where an empty caption is 0 (Eq. 6).

    Returns:
        Scalar, float32 (float64 if an input is); 0, still attached to the graph, if no token is valid.

    Raises:
        TypeError: features not floating point, a mask not bool.
        ValueError: wrong shapes or devices, an unknown reduction, a logit_scale of several elements.
    """
    check_features("b l d, b l d", grouped=grouped, token_features=token_features)
    check_mask("token_mask", token_mask, token_features.shape[:2], "b l", token_features.device)
    check_choice("reduction", reduction, REDUCTIONS)
    grouped, token_features = zero_where_masked(grouped, token_mask), zero_where_masked(token_features, token_mask)
    cosine = product(l2_normalised(grouped), l2_normalised(token_features), "b j d, b k d -> b j k")
    logits = cosine * _one_element(logit_scale, cosine)

    both_valid = rearrange(token_mask, "b j -> b j 1") & rearrange(token_mask, "b k -> b 1 k")
    # The lowest finite number, not -inf: with -inf, rows of masked tokens would be NaN, and NaN * 0 is NaN.
    logits = logits.masked_fill(~both_valid, torch.finfo(logits.dtype).min)
    match = torch.diagonal(logits, dim1=-2, dim2=-1)
    loss = (logits.logsumexp(dim=-1) + logits.logsumexp(dim=-2)) / 2 - match
    loss = loss.where(token_mask, 0)

    if reduction == "token":
        return loss.sum() / token_mask.sum().clamp(min=1)
    return (loss.sum(dim=-1) / token_mask.sum(dim=-1).clamp(min=1)).sum() / max(len(loss), 1)


def fine_grained_loss(
    patch_features: Tensor,
    token_features: Tensor,
    token_mask: Tensor,
    logit_scale: Tensor | float,
    *,
    threshold: float | None = None,
    alignment: Alignment = "sparse",
    reduction: Reduction = "token",
    patch_mask: Tensor | None = None,
    region_mask: Tensor | None = None,
) -> Tensor:
    """SPARC's fine-grained loss L_f: Eqs. 2 to 6 in a row.

    Args:
        patch_features: [B, P, D], not normalised.
        token_features: [B, L, D], not normalised.
        token_mask: bool [B, L], True for valid tokens.
        logit_scale: 1/tau, a number or a tensor of one element.
        threshold: sigma of Eq. 3, in [0, 1]; None is 1/P.
        alignment: "sparse", "dense" or "softmax", see `alignment_weights`.
        reduction: "token" or "sample", see `sequence_contrastive_loss`.
        patch_mask: bool [B, P], False for padding patches.
        region_mask: bool [B, L, P], True for the patches a token may use; a token that may use none is not valid.

    Returns:
        Scalar, float32 (float64 if a feature is).

    Raises:
        TypeError: features not floating point, a mask not bool, a threshold that is not a number.
        ValueError: wrong shapes or devices, a threshold outside [0, 1], an unknown alignment or reduction.

    Example:
        >>> patches, tokens = torch.randn(2, 49, 16), torch.randn(2, 7, 16)
        >>> fine_grained_loss(patches, tokens, torch.ones(2, 7, dtype=torch.bool), logit_scale=10.0).shape
        torch.Size([])
    """
    check_features("b p d, b l d", patch_features=patch_features, token_features=token_features)
    check_choice("alignment", alignment, ALIGNMENTS)
    token_mask = valid_tokens(token_features, patch_features, token_mask, patch_mask, region_mask)
    patch_features = zero_where_masked(patch_features, patch_mask)
    token_features = zero_where_masked(token_features, token_mask)
    similarity = token_patch_similarity(token_features, patch_features)
    weights = alignment_weights(similarity, threshold, alignment, patch_mask, region_mask)
    grouped = language_grouped_embeddings(weights, patch_features)
    return sequence_contrastive_loss(grouped, token_features, token_mask, logit_scale, reduction)


def alignment_scores(grouped: Tensor, token_features: Tensor, token_mask: Tensor) -> Tensor:
    """How well each caption matches the image that its groups come from: the mean of cos(t_l, c_l) over its tokens.

    Not in the paper; see `image_contrastive_loss`.

    Shape:
        grouped: [B, L, D], from `language_grouped_embeddings`.
        token_features: [B, L, D].
        token_mask: bool [B, L], True for valid tokens.
        Returns [B], float32 (float64 if an input is), in [-1, 1]; 0 for a caption without a valid token.

    Raises:
        TypeError: features not floating point, a mask not bool.
        ValueError: wrong shapes or devices.
    """
    check_features("b l d, b l d", grouped=grouped, token_features=token_features)
    check_mask("token_mask", token_mask, token_features.shape[:2], "b l", token_features.device)
    grouped, token_features = zero_where_masked(grouped, token_mask), zero_where_masked(token_features, token_mask)
    cosine = product(l2_normalised(grouped), l2_normalised(token_features), "b l d, b l d -> b l")
    return cosine.where(token_mask, 0).sum(dim=-1) / token_mask.sum(dim=-1).clamp(min=1)


def image_contrastive_loss(
    patch_features: Tensor,
    token_features: Tensor,
    token_mask: Tensor,
    logit_scale: Tensor | float,
    image_negatives: int,
    *,
    threshold: float | None = None,
    alignment: Alignment = "sparse",
    reduction: Reduction = "token",
    direction: Direction = "text_to_image",
    patch_mask: Tensor | None = None,
    region_mask: Tensor | None = None,
) -> Tensor:
    """Contrast of each caption's alignment with its own image against its alignment with K other images of the batch.

    Not in the paper. Eq. 6 compares a caption with groups of its own image only, and groups of another image can
    separate the tokens just as well. This loss requires that the own image fits best. Caption i scores image k by
    `alignment_scores`, with c_l from the patches of image k (Eqs. 2 to 5). It scores its own image and those of the
    next K pairs, where the first pair follows the last. If the batch has fewer than K other images, it scores all of
    them. The loss is the cross-entropy over the 1 + K scores * logit_scale, with the own image as target. In a batch
    of one pair the loss and its gradient are 0.

    With `direction="both"` the same scores are also read by images: image k is scored by its own caption and by those
    of the K pairs before it, and its own caption is the target. The loss is the mean of the two cross-entropies, as
    CLIP's is. A caption without a valid token is no negative.

    To contrast the alignment of captions and images is older than this package: SCAN (Lee et al., ECCV 2018),
    Info-Ground (Gupta et al., arXiv 2006.09920), OVR-CNN (Zareian et al., arXiv 2011.10678). The alignment by SPARC's
    weights, and K images of the own batch instead of all pairs, are ours.

    Valid tokens are those of `fine_grained_loss`. `region_mask` applies to the own image only: in other images every
    patch may be used. An image without a valid patch is not used as a negative.

    Args:
        patch_features: [B, P, D], not normalised.
        token_features: [B, L, D], not normalised.
        token_mask: bool [B, L], True for valid tokens.
        logit_scale: 1/tau, a number or a tensor of one element; scores are cosines, as in Eq. 6.
        image_negatives: K, at least 1.
        threshold: sigma of Eq. 3, in [0, 1]; None is 1/P.
        alignment: "sparse", "dense" or "softmax", see `alignment_weights`.
        reduction: "token" is the mean over the captions with a valid token; "sample" over all B captions, where the
            others are 0.
        direction: "text_to_image", or "both".
        patch_mask: bool [B, P], False for padding patches.
        region_mask: bool [B, L, P], True for the patches of its own image that a token may use; a token that may use
            none is not valid.

    Returns:
        Scalar, float32 (float64 if a feature is); 0, still attached to the graph, if no token is valid.

    Raises:
        TypeError: features not floating point, a mask not bool, a threshold or K that is not a (whole) number.
        ValueError: wrong shapes or devices, a threshold outside [0, 1], an unknown alignment, reduction or direction,
            a logit_scale of several elements, a K below 1.

    Example:
        >>> patches, tokens = torch.randn(4, 49, 16), torch.randn(4, 7, 16)
        >>> mask = torch.ones(4, 7, dtype=torch.bool)
        >>> image_contrastive_loss(patches, tokens, mask, logit_scale=10.0, image_negatives=3).shape
        torch.Size([])
    """
    check_features("b p d, b l d", patch_features=patch_features, token_features=token_features)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("alignment", alignment, ALIGNMENTS)
    check_choice("direction", direction, DIRECTIONS)
    images_per_caption = 1 + available_negatives(image_negatives, len(patch_features))
    token_mask = valid_tokens(token_features, patch_features, token_mask, patch_mask, region_mask)
    patch_features = zero_where_masked(patch_features, patch_mask)
    token_features = zero_where_masked(token_features, token_mask)
    # Every image is used 1 + K times: sum its gradients before they are rounded to its dtype.
    patch_features, token_features = full_precision(patch_features), full_precision(token_features)

    images = images_of_captions(len(patch_features), images_per_caption, patch_features.device)
    scores = []
    for k, image in enumerate(images.unbind(dim=1)):
        patches, mask = patch_features[image], None if patch_mask is None else patch_mask[image]
        similarity = token_patch_similarity(token_features, patches)
        weights = alignment_weights(similarity, threshold, alignment, mask, region_mask if k == 0 else None)
        scores.append(alignment_scores(language_grouped_embeddings(weights, patches), token_features, token_mask))
    logits = torch.stack(scores, dim=1)
    logits = logits * _one_element(logit_scale, logits)
    if patch_mask is not None:
        # The lowest finite number, not -inf: see `sequence_contrastive_loss`.
        logits = logits.masked_fill(~patch_mask.any(dim=1)[images], torch.finfo(logits.dtype).min)

    captions = token_mask.any(dim=-1)
    loss = logits.logsumexp(dim=1) - logits[:, 0]
    if direction == "both":
        rows, columns = places_by_image(logits)
        by_image = logits[rows, columns].masked_fill(~captions[rows], torch.finfo(logits.dtype).min)
        loss = (loss + by_image.logsumexp(dim=1) - by_image[:, 0]) / 2
    loss = loss.where(captions, 0)
    return loss.sum() / (captions.sum().clamp(min=1) if reduction == "token" else max(len(captions), 1))


def images_of_captions(batch: int, images: int, device: torch.device) -> Tensor:
    """The images that each caption is scored on, int64 [B, `images`]: its own, then the next ones of the batch."""
    return (torch.arange(batch, device=device)[:, None] + torch.arange(images, device=device)) % max(batch, 1)


def places_by_image(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Where the scores of an image stand: the rows and columns, int64 [B, 1 + K] and [1 + K], of `logits` [B, 1 + K].

    Column k of row i is caption i on image i + k. So column k of row j, by image, is caption j - k on image j.
    """
    columns = torch.arange(logits.shape[1], device=logits.device)
    return (torch.arange(len(logits), device=logits.device)[:, None] - columns) % max(len(logits), 1), columns


def available_negatives(image_negatives: int, batch: int) -> int:
    """The number of other images with which a caption is contrasted: `image_negatives`, or all if there are fewer.

    Raises:
        TypeError: image_negatives is not an int.
        ValueError: image_negatives is below 1.
    """
    check_whole_number("image_negatives", image_negatives, 1)
    return min(image_negatives, max(batch - 1, 0))


def _min_max_normalised(similarity: Tensor, usable: Tensor) -> Tensor:
    """Eq. 2 over the usable patches; 1 everywhere for a token to which all patches are equally similar."""
    lowest = similarity.masked_fill(~usable, torch.inf).amin(dim=-1, keepdim=True)
    highest = similarity.masked_fill(~usable, -torch.inf).amax(dim=-1, keepdim=True)
    spread = highest - lowest
    flat = spread == 0
    return ((similarity - lowest) / spread.where(~flat, 1)).where(~flat, 1)


def _one_element(logit_scale: Tensor | float, like: Tensor) -> Tensor | float:
    """The scale as a scalar of like's dtype and device."""
    check_scale(logit_scale)
    return logit_scale.reshape(()).to(like) if isinstance(logit_scale, Tensor) else logit_scale
