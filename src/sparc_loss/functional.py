"""SPARC's objective, one small function per equation (arXiv 2401.09865), and a contrast with other images beside it.

This file is the readable truth: plain PyTorch, differentiable to any order. Whatever is faster is held against it.

Letters, here and everywhere: B image-text pairs, P patches of an image, L tokens of a caption, D dimensions of the
space that images and texts share. Everything is computed in float32 at least, whatever the autocast: in bfloat16 the
arg-min of Eq. 2 flips and the gradient is wrong by a tenth. Float64 stays float64.

Finite features give a finite loss as long as their products fit float32 (magnitudes from about 1e-18 to 1e18). NaN or
infinity in a patch or token that counts is never hidden: it makes the loss NaN. The values of masked patches and
tokens have no effect, and their gradient is zero.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from einops import einsum, rearrange
from torch import Tensor

from sparc_loss._validation import (
    check_choice,
    check_features,
    check_mask,
    check_number,
    check_scale,
    check_whole_number,
)

Alignment = Literal["sparse", "dense", "softmax"]
Reduction = Literal["token", "sample"]

ALIGNMENTS: tuple[Alignment, ...] = ("sparse", "dense", "softmax")
REDUCTIONS: tuple[Reduction, ...] = ("token", "sample")


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
    return _einsum(token_features, patch_features, "b l d, b p d -> b l p")


def alignment_weights(
    similarity: Tensor,
    threshold: float | None = None,
    method: Alignment = "sparse",
    patch_mask: Tensor | None = None,
    region_mask: Tensor | None = None,
) -> Tensor:
    """How much each token takes from each patch: a_lp (Eqs. 2-4). Rows are non-negative and sum to one.

    Similarities are min-max normalised per token over its patches (Eq. 2), those below `threshold` dropped (Eq. 3)
    and the rest divided by their sum (Eq. 4). A token to which all patches are equally similar takes the same from
    each, and no gradient flows through its weights.

    Args:
        similarity: [B, L, P], from `token_patch_similarity`.
        threshold: sigma of Eq. 3, in [0, 1]; None is the paper's 1/P, with P the number of patches the token may use.
        method: "sparse" (the paper), "dense" (Eq. 3 skipped) or "softmax" (softmax over patches instead of Eqs. 2-4).
        patch_mask: bool [B, P], False for the padding of variable-resolution images.
        region_mask: bool [B, L, P], True for the patches that a token may use at all.

    Returns:
        [B, L, P] of similarity's dtype, at least float32. A token that may use no patch has a row of zeros.

    Raises:
        TypeError: similarity not floating point, a mask not bool, a threshold that is no number.
        ValueError: wrong shapes or devices, a threshold outside [0, 1], an unknown method.
    """
    check_features("b l p", similarity=similarity)
    check_choice("method", method, ALIGNMENTS)
    if threshold is not None:
        check_number("threshold", threshold, 0, 1)
    if similarity.shape[-1] == 0:
        raise ValueError(f"similarity has shape {list(similarity.shape)}; expected at least one patch")
    similarity = _full_precision(similarity)
    usable = usable_patches(similarity.shape, similarity.device, patch_mask, region_mask)
    # A row without a usable patch is computed as if it had all and zeroed at the end: no 0/0 reaches the gradient.
    candidate = usable | ~usable.any(dim=-1, keepdim=True)
    # An infinite similarity of an unusable patch would reach the gradient as 0 * inf.
    similarity = similarity.masked_fill(~usable, 0)

    if method == "softmax":
        weights = similarity.masked_fill(~candidate, -torch.inf).softmax(dim=-1)
    else:
        weights = _min_max_normalised(similarity, candidate)
        if method == "sparse":
            # In similarity's dtype: 1/3 rounded to float32 would drop a float64 1/3.
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
    return _einsum(weights, patch_features, "b l p, b p d -> b l d")


def sequence_contrastive_loss(
    grouped: Tensor,
    token_features: Tensor,
    token_mask: Tensor,
    logit_scale: Tensor | float,
    reduction: Reduction = "token",
) -> Tensor:
    """Contrast of every token with its own group of patches against the other tokens of its caption (Eq. 6).

    Symmetric cross-entropy over cos(c_j, t_k) * logit_scale within each pair, target k = j. Masked tokens are left
    out of the softmax and of the mean. A zero vector has cosine 0 with everything.

    Args:
        grouped: [B, L, D], from `language_grouped_embeddings`.
        token_features: [B, L, D].
        token_mask: bool [B, L], True for the tokens that count; holes and empty captions are fine.
        logit_scale: 1/tau, a number or a tensor of one element.
        reduction: "token" divides the sum over all tokens of the batch by their number (Listing 1);
            "sample" averages over the tokens of each caption, then over the B captions, empty ones counting 0 (Eq. 6).

    Returns:
        Scalar, float32 (float64 if an input is); 0, still attached to the graph, if no token counts.

    Raises:
        TypeError: features not floating point, a mask not bool.
        ValueError: wrong shapes or devices, an unknown reduction, a logit_scale of several elements.
    """
    check_features("b l d, b l d", grouped=grouped, token_features=token_features)
    check_mask("token_mask", token_mask, token_features.shape[:2], "b l", token_features.device)
    check_choice("reduction", reduction, REDUCTIONS)
    grouped, token_features = zero_where_masked(grouped, token_mask), zero_where_masked(token_features, token_mask)
    cosine = _einsum(_l2_normalised(grouped), _l2_normalised(token_features), "b j d, b k d -> b j k")
    logits = cosine * _one_element(logit_scale, cosine)

    both_count = rearrange(token_mask, "b j -> b j 1") & rearrange(token_mask, "b k -> b 1 k")
    # The lowest finite number, not -inf: rows of masked tokens would become NaN, and NaN * 0 is NaN.
    logits = logits.masked_fill(~both_count, torch.finfo(logits.dtype).min)
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
        token_mask: bool [B, L], True for the tokens that count.
        logit_scale: 1/tau, a number or a tensor of one element.
        threshold: sigma of Eq. 3, in [0, 1]; None is 1/P.
        alignment: "sparse", "dense" or "softmax", see `alignment_weights`.
        reduction: "token" or "sample", see `sequence_contrastive_loss`.
        patch_mask: bool [B, P], False for padding patches.
        region_mask: bool [B, L, P], True for the patches a token may use; a token that may use none does not count.

    Returns:
        Scalar, float32 (float64 if a feature is).

    Raises:
        TypeError: features not floating point, a mask not bool, a threshold that is no number.
        ValueError: wrong shapes or devices, a threshold outside [0, 1], an unknown alignment or reduction.

    Example:
        >>> patches, tokens = torch.randn(2, 49, 16), torch.randn(2, 7, 16)
        >>> fine_grained_loss(patches, tokens, torch.ones(2, 7, dtype=torch.bool), logit_scale=10.0).shape
        torch.Size([])
    """
    check_features("b p d, b l d", patch_features=patch_features, token_features=token_features)
    check_choice("alignment", alignment, ALIGNMENTS)
    token_mask = countable_tokens(token_features, patch_features, token_mask, patch_mask, region_mask)
    patch_features = zero_where_masked(patch_features, patch_mask)
    token_features = zero_where_masked(token_features, token_mask)
    similarity = token_patch_similarity(token_features, patch_features)
    weights = alignment_weights(similarity, threshold, alignment, patch_mask, region_mask)
    grouped = language_grouped_embeddings(weights, patch_features)
    return sequence_contrastive_loss(grouped, token_features, token_mask, logit_scale, reduction)


def alignment_scores(grouped: Tensor, token_features: Tensor, token_mask: Tensor) -> Tensor:
    """How well each caption is found in the image that its groups come from: mean over its tokens of cos(t_l, c_l).

    Not in the paper; see `image_contrastive_loss`.

    Shape:
        grouped: [B, L, D], from `language_grouped_embeddings`.
        token_features: [B, L, D].
        token_mask: bool [B, L], True for the tokens that count.
        Returns [B], float32 (float64 if an input is), in [-1, 1]; 0 for a caption without a token that counts.

    Raises:
        TypeError: features not floating point, a mask not bool.
        ValueError: wrong shapes or devices.
    """
    check_features("b l d, b l d", grouped=grouped, token_features=token_features)
    check_mask("token_mask", token_mask, token_features.shape[:2], "b l", token_features.device)
    grouped, token_features = zero_where_masked(grouped, token_mask), zero_where_masked(token_features, token_mask)
    cosine = _einsum(_l2_normalised(grouped), _l2_normalised(token_features), "b l d, b l d -> b l")
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
    patch_mask: Tensor | None = None,
    region_mask: Tensor | None = None,
) -> Tensor:
    """Contrast of each caption's alignment with its own image against those with K other images of the batch.

    Not in the paper. Eq. 6 compares a caption with groups of its own image only, and groups of another image may tell
    the tokens apart as well; here they must not. Caption i scores image k by `alignment_scores`, with c_l from the
    patches of image k (Eqs. 2 to 5). The images are its own and those of the next K pairs, the first pair following
    the last; all other images where the batch has fewer than K. Cross-entropy over the 1 + K scores * logit_scale, the
    own image as target. A batch of one pair has nothing to contrast: its loss and its gradient are 0.

    A token counts as in `fine_grained_loss`: by its own image. Other images it searches whole, as the regions of
    `region_mask` lie in the own one. An image without a patch is no negative of any caption.

    Args:
        patch_features: [B, P, D], not normalised.
        token_features: [B, L, D], not normalised.
        token_mask: bool [B, L], True for the tokens that count.
        logit_scale: 1/tau, a number or a tensor of one element; scores are cosines, as in Eq. 6.
        image_negatives: K, at least 1.
        threshold: sigma of Eq. 3, in [0, 1]; None is 1/P.
        alignment: "sparse", "dense" or "softmax", see `alignment_weights`.
        reduction: "token" averages over the captions with a token that counts; "sample" over all B, the others
            counting 0.
        patch_mask: bool [B, P], False for padding patches.
        region_mask: bool [B, L, P], True for the patches of its own image that a token may use; a token that may use
            none does not count.

    Returns:
        Scalar, float32 (float64 if a feature is); 0, still attached to the graph, if no token counts.

    Raises:
        TypeError: features not floating point, a mask not bool, a threshold that is no number, a K that is not whole.
        ValueError: wrong shapes or devices, a threshold outside [0, 1], an unknown alignment or reduction, a
            logit_scale of several elements, a K below 1.

    Example:
        >>> patches, tokens = torch.randn(4, 49, 16), torch.randn(4, 7, 16)
        >>> mask = torch.ones(4, 7, dtype=torch.bool)
        >>> image_contrastive_loss(patches, tokens, mask, logit_scale=10.0, image_negatives=3).shape
        torch.Size([])
    """
    check_features("b p d, b l d", patch_features=patch_features, token_features=token_features)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("alignment", alignment, ALIGNMENTS)
    images_per_caption = 1 + available_negatives(image_negatives, len(patch_features))
    token_mask = countable_tokens(token_features, patch_features, token_mask, patch_mask, region_mask)
    patch_features = zero_where_masked(patch_features, patch_mask)
    token_features = zero_where_masked(token_features, token_mask)
    # Every image is used 1 + K times: let its gradients meet before they are rounded to its dtype.
    patch_features, token_features = _full_precision(patch_features), _full_precision(token_features)

    place = torch.arange(len(patch_features), device=patch_features.device)
    images = (place[:, None] + torch.arange(images_per_caption, device=place.device)) % len(place)
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
    loss = (logits.logsumexp(dim=1) - logits[:, 0]).where(captions, 0)
    return loss.sum() / (captions.sum().clamp(min=1) if reduction == "token" else max(len(captions), 1))


def available_negatives(image_negatives: int, batch: int) -> int:
    """How many other images a caption of the batch is contrasted with: `image_negatives`, or as many as there are.

    Raises:
        TypeError: image_negatives is no int.
        ValueError: image_negatives is below 1.
    """
    check_whole_number("image_negatives", image_negatives, 1)
    return min(image_negatives, max(batch - 1, 0))


def zero_where_masked(features: Tensor, mask: Tensor | None) -> Tensor:
    """Features [B, N, D] with zeros where `mask`, bool [B, N], is False; as they are where it is None."""
    return features if mask is None else features.masked_fill(~rearrange(mask, "b n -> b n 1"), 0)


def autocast_disabled(device: torch.device) -> AbstractContextManager:
    """A context without autocast; some devices, such as meta, have none."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def countable_tokens(
    token_features: Tensor,
    patch_features: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None = None,
    region_mask: Tensor | None = None,
) -> Tensor:
    """The tokens over which the loss is a mean: those of `token_mask` that may use at least one patch, bool [B, L]."""
    check_mask("token_mask", token_mask, token_features.shape[:2], "b l", token_features.device)
    if patch_mask is None and region_mask is None:
        return token_mask
    shape = torch.Size((*token_features.shape[:2], patch_features.shape[1]))
    return token_mask & usable_patches(shape, token_features.device, patch_mask, region_mask).any(dim=-1)


def usable_patches(
    shape: torch.Size, device: torch.device, patch_mask: Tensor | None, region_mask: Tensor | None
) -> Tensor:
    """The patches that each token may use: both masks together, bool [B, L, P] of the given shape."""
    batch, _, patches = shape
    usable = torch.ones(shape, dtype=torch.bool, device=device)
    if patch_mask is not None:
        check_mask("patch_mask", patch_mask, (batch, patches), "b p", device)
        usable = usable & rearrange(patch_mask, "b p -> b 1 p")
    if region_mask is not None:
        check_mask("region_mask", region_mask, shape, "b l p", device)
        usable = usable & region_mask
    return usable


def _min_max_normalised(similarity: Tensor, usable: Tensor) -> Tensor:
    """Eq. 2 over the usable patches; 1 everywhere for a token to which all patches are equally similar."""
    lowest = similarity.masked_fill(~usable, torch.inf).amin(dim=-1, keepdim=True)
    highest = similarity.masked_fill(~usable, -torch.inf).amax(dim=-1, keepdim=True)
    spread = highest - lowest
    flat = spread == 0
    return ((similarity - lowest) / spread.where(~flat, 1)).where(~flat, 1)


def _l2_normalised(features: Tensor) -> Tensor:
    """Unit vectors; a zero vector stays zero, and no eps swallows the gradient of tiny ones."""
    features = _full_precision(features)
    # Scaled to a largest component of 1, squares neither overflow nor vanish; a unit vector is the same at any scale.
    largest = features.detach().abs().amax(dim=-1, keepdim=True)
    is_zero = largest == 0
    features = features / largest.masked_fill(is_zero, 1)
    # The norm of a zero vector has no second derivative: let it have the norm of another.
    return features / torch.linalg.vector_norm(features.masked_fill(is_zero, 1), dim=-1, keepdim=True)


def _one_element(logit_scale: Tensor | float, like: Tensor) -> Tensor | float:
    """The scale as a scalar of like's dtype and device."""
    check_scale(logit_scale)
    return logit_scale.reshape(()).to(like) if isinstance(logit_scale, Tensor) else logit_scale


def _full_precision(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _einsum(left: Tensor, right: Tensor, pattern: str) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    with autocast_disabled(left.device):
        return einsum(left.to(dtype), right.to(dtype), pattern)
