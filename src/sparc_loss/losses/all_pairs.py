"""Contrast of every image with every caption of the batch, on all ranks, by their patches and tokens.

Cost for B pairs on each of W ranks: every rank scores B * W * B pairs by P * L similarities each, one block at a time,
and again in the backward pass. It receives the tokens of all ranks, W * B * L * D numbers, and all-reduces a gradient
of the same size. Patches are not exchanged, so P may differ between ranks. Captions are padded to the longest of all
ranks. B must be the same on each rank, as in open_clip.
"""

from collections.abc import Callable, Iterator

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sparc_loss.losses.distributed import gathered, padded_to_longest

BLOCK_NUMBERS = 2**24
"""Maximum size of one tensor of a block: 64 MiB in float32. A block has a few such tensors."""

Score = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Scores [2, I, C] of I images and C captions, image-to-text and text-to-image, from their patches [I, P, D], patch
mask [I, P], tokens [C, L, D] and token mask [C, L]; every row of a mask has at least one True."""


def all_pairs_loss(
    score: Score,
    patch_features: Tensor,
    patch_mask: Tensor,
    token_features: Tensor,
    token_mask: Tensor,
    logit_scale: Tensor | float,
    world_size: int = 1,
) -> Tensor:
    """InfoNCE over the pairs of all ranks, mean of image-to-text and text-to-image, the same on each rank.

    A pair without a valid token or without a valid patch is left out; without any pair the loss is 0, still attached
    to the graph.

    Args:
        score: the objective's score of images and captions.
        patch_features: [B, P, D], this rank's.
        patch_mask: bool [B, P].
        token_features: [B, L, D], this rank's.
        token_mask: bool [B, L].
        logit_scale: 1/tau, a number or a tensor of one element.
        world_size: number of ranks; B is the same on each.

    Returns:
        Scalar, float32 (float64 if a feature is).
    """
    valid = gathered(token_mask.any(dim=1) & patch_mask.any(dim=1), world_size)
    token_features, token_mask = padded_to_longest(token_features, token_mask, world_size)
    tokens, token_mask = gathered(token_features, world_size), gathered(token_mask, world_size)
    scores = all_pairs_scores(score, patch_features, patch_mask, tokens, token_mask)
    scores = gathered(rearrange(scores, "way i c -> i way c"), world_size)
    per_image, per_text = (scores * logit_scale).unbind(dim=1)

    both_valid = rearrange(valid, "i -> i 1") & rearrange(valid, "c -> 1 c")
    # The lowest finite number, not -inf, with which the rows of invalid pairs would be NaN.
    lowest = torch.finfo(scores.dtype).min
    per_image, per_text = per_image.masked_fill(~both_valid, lowest), per_text.masked_fill(~both_valid, lowest)
    image_to_text = per_image.logsumexp(dim=1) - per_image.diagonal()
    text_to_image = per_text.logsumexp(dim=0) - per_text.diagonal()
    loss = ((image_to_text + text_to_image) / 2).where(valid, 0)
    return loss.sum() / valid.sum().clamp(min=1)


def all_pairs_scores(
    score: Score,
    patch_features: Tensor,
    patch_mask: Tensor,
    token_features: Tensor,
    token_mask: Tensor,
    numbers_of_score: int = 1,
) -> Tensor:
    """Scores [2, I, C] of all I images and C captions, block by block; an empty one gets an arbitrary finite score.

    An image or a caption without a valid entry keeps all of them, so that its scores are finite.
    Captions are sorted by their number of tokens, longest first, so that a block has little padding. If there are
    several blocks, each is computed again in the backward pass instead of being kept. `numbers_of_score` is the
    size of the largest tensor that `score` makes, for each image and token, where that is more than P and D.
    """
    patch_mask, token_mask = (mask | ~mask.any(dim=1, keepdim=True) for mask in (patch_mask, token_mask))
    longest_first = token_mask.sum(dim=1).argsort(descending=True, stable=True)
    # The host waits for the device here and nowhere else.
    numbers = torch.cat([patch_mask.sum(dim=1), token_mask.sum(dim=1)]).tolist()
    numbers_of_patches, lengths = numbers[: len(patch_mask)], sorted(numbers[len(patch_mask) :], reverse=True)
    patch_features, patch_mask = _packed(patch_features, patch_mask, numbers_of_patches)
    token_features, token_mask = _packed(token_features, token_mask, lengths)
    token_features, token_mask = token_features[longest_first], token_mask[longest_first]
    width = max(*patch_features.shape[1:], numbers_of_score)
    blocks = list(_blocks(lengths, len(patch_features), width))

    columns: dict[int, list[Tensor]] = {}
    for images, captions, length in blocks:
        # Slices, so that autograd keeps views of one tensor.
        block = (
            patch_features[images],
            patch_mask[images],
            token_features[captions, :length],
            token_mask[captions, :length],
        )
        if len(blocks) == 1:
            result = score(*block)
        else:
            result = checkpoint(score, *block, use_reentrant=False, preserve_rng_state=False)
        columns.setdefault(captions.start, []).append(result)
    scores = torch.cat([torch.cat(rows, dim=1) for rows in columns.values()], dim=2)
    return scores[:, :, longest_first.argsort()]


def _packed(features: Tensor, mask: Tensor, numbers: list[int]) -> tuple[Tensor, Tensor]:
    """Each row with its valid entries first, cut to the longest row; `numbers` are those of valid entries."""
    if min(numbers) == mask.shape[1]:
        return features, mask
    order = mask.byte().argsort(dim=1, descending=True, stable=True)[:, : max(numbers)]
    index = order[:, :, None].expand(-1, -1, features.shape[-1])
    return features.gather(1, index), mask.gather(1, order)


def _blocks(lengths: list[int], images: int, width: int) -> Iterator[tuple[slice, slice, int]]:
    """Images, captions and longest caption of each block, given each caption's number of tokens, in falling order."""
    start = 0
    while start < len(lengths):
        pairs = max(1, BLOCK_NUMBERS // (lengths[start] * width))
        rows = min(images, pairs)
        captions = slice(start, min(start + pairs // rows, len(lengths)))
        for first in range(0, images, rows):
            yield slice(first, first + rows), captions, lengths[start]
        start = captions.stop
