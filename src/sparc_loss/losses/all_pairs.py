"""Contrast of every image with every caption of the batch, on all ranks, by their patches and tokens.

What that costs, for B pairs on each of W ranks: every rank scores B * W * B pairs by P * L similarities each, a block
a time, and again in the backward pass. It receives the tokens of all ranks, W * B * L * D numbers, and all-reduces as
many of gradient. Patches stay where they are, so P may differ between ranks. Captions are padded to the longest of all
ranks. B must be the same on each rank, as open_clip's batches are.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sparc_loss._validation import check_mask

BLOCK_NUMBERS = 2**24
"""The most numbers in one tensor of a block: 64 MiB in float32, of which a block holds a few."""

Score = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Scores [2, I, C] of I images and C captions, image-to-text and text-to-image, from their patches [I, P, D], patch
mask [I, P], tokens [C, L, D] and token mask [C, L]; every row of a mask has at least one True."""


def check_masks(
    name: str,
    patch_features: Tensor,
    token_features: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    region_mask: Tensor | None,
) -> Tensor:
    """Check the masks of an objective without regions, `name`; the patch mask, bool [B, P], all True where None.

    Raises:
        TypeError: a mask not bool.
        ValueError: wrong shapes or devices; no pair, patch or token at all; a region_mask.
    """
    for feature_name, features in (("patch_features", patch_features), ("token_features", token_features)):
        if 0 in features.shape:
            raise ValueError(f"{feature_name} has shape {list(features.shape)}; expected no size of 0")
    check_mask("token_mask", token_mask, token_features.shape[:2], "b l", token_features.device)
    if region_mask is not None:
        raise ValueError(f"region_mask is given; expected None: {name} lets every token use every patch")
    if patch_mask is None:
        return torch.ones(patch_features.shape[:2], dtype=torch.bool, device=patch_features.device)
    check_mask("patch_mask", patch_mask, patch_features.shape[:2], "b p", patch_features.device)
    return patch_mask


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

    A pair without a token or without a patch is as if it were not in the batch; without any pair the loss is 0, still
    attached to the graph.

    Args:
        score: what the objective scores images and captions by.
        patch_features: [B, P, D], this rank's.
        patch_mask: bool [B, P].
        token_features: [B, L, D], this rank's.
        token_mask: bool [B, L].
        logit_scale: 1/tau, a number or a tensor of one element.
        world_size: number of ranks; B is the same on each.

    Returns:
        Scalar, float32 (float64 if a feature is).
    """
    counts = gathered(token_mask.any(dim=1) & patch_mask.any(dim=1), world_size)
    token_features, token_mask = padded_to_longest(token_features, token_mask, world_size)
    tokens, token_mask = gathered(token_features, world_size), gathered(token_mask, world_size)
    scores = all_pairs_scores(score, patch_features, patch_mask, tokens, token_mask)
    scores = gathered(rearrange(scores, "way i c -> i way c"), world_size)
    per_image, per_text = (scores * logit_scale).unbind(dim=1)

    both_count = rearrange(counts, "i -> i 1") & rearrange(counts, "c -> 1 c")
    # The lowest finite number, not -inf, which would make NaN of the rows of pairs that do not count.
    lowest = torch.finfo(scores.dtype).min
    per_image, per_text = per_image.masked_fill(~both_count, lowest), per_text.masked_fill(~both_count, lowest)
    image_to_text = per_image.logsumexp(dim=1) - per_image.diagonal()
    text_to_image = per_text.logsumexp(dim=0) - per_text.diagonal()
    loss = ((image_to_text + text_to_image) / 2).where(counts, 0)
    return loss.sum() / counts.sum().clamp(min=1)


def all_pairs_scores(
    score: Score, patch_features: Tensor, patch_mask: Tensor, token_features: Tensor, token_mask: Tensor
) -> Tensor:
    """Scores [2, I, C] of all I images and C captions, block by block; an empty one gets some finite score.

    Captions are taken by their number of tokens, longest first, so that a block has little padding. Where there are
    several blocks, each is computed again in the backward pass instead of kept.
    """
    patch_features, patch_mask = _packed(patch_features, patch_mask)
    token_features, token_mask = _packed(token_features, token_mask)
    lengths, longest_first = token_mask.sum(dim=1).sort(descending=True, stable=True)
    token_features, token_mask = token_features[longest_first], token_mask[longest_first]
    blocks = list(_blocks(lengths.tolist(), len(patch_features), max(patch_features.shape[1:])))

    columns: dict[int, list[Tensor]] = {}
    for images, captions, length in blocks:
        # Slices, so that what is kept for the backward pass are views of one tensor.
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


def gathered(tensor: Tensor, world_size: int) -> Tensor:
    """[W * B, ...]: the [B, ...] of all ranks in their order. Gradients flow back, summed over ranks."""
    if world_size == 1:
        return tensor
    if tensor.dtype == torch.bool:
        return gathered(tensor.byte(), world_size).bool()
    return _Gathered.apply(tensor, world_size)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the last axis of what `mask` marks, at least one in each row."""
    return values.masked_fill(~mask, 0).sum(dim=-1) / mask.sum(dim=-1)


def padded_to_longest(token_features: Tensor, token_mask: Tensor, world_size: int) -> tuple[Tensor, Tensor]:
    """Tokens [B, L, D] and mask [B, L] with masked zeros at the end, so that L is the same on each rank."""
    if world_size == 1:
        return token_features, token_mask
    length = token_mask.shape[1]
    longest = torch.tensor(length, device=token_mask.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    missing = longest.item() - length
    return F.pad(token_features, (0, 0, 0, missing)), F.pad(token_mask, (0, missing))


class _Gathered(torch.autograd.Function):
    """all_gather with gradient; torch.distributed.nn's is deprecated, and its successors are not in every torch."""

    @staticmethod
    def forward(context: Any, tensor: Tensor, world_size: int) -> Tensor:
        context.pairs = len(tensor)
        everywhere = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size)]
        dist.all_gather(everywhere, tensor.contiguous())
        return torch.cat(everywhere)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Not reduce_scatter, which gloo has not everywhere.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[dist.get_rank() * context.pairs :][: context.pairs], None


def _packed(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What counts moved to the front of each row, and the rest cut off as far as no row needs it.

    A row in which nothing counts keeps all, as if it counted: its scores are finite, and no one looks at them.
    """
    mask = mask | ~mask.any(dim=1, keepdim=True)
    if mask.all():
        return features, mask
    longest = int(mask.sum(dim=1).max())
    order = mask.byte().argsort(dim=1, descending=True, stable=True)[:, :longest]
    index = order[:, :, None].expand(-1, -1, features.shape[-1])
    return features.gather(1, index), mask.gather(1, order)


def _blocks(lengths: list[int], images: int, width: int) -> Iterator[tuple[slice, slice, int]]:
    """Images, captions and longest caption of each block, given the number of tokens of each caption, falling."""
    start = 0
    while start < len(lengths):
        pairs = max(1, BLOCK_NUMBERS // (lengths[start] * width))
        rows = min(images, pairs)
        captions = slice(start, min(start + pairs // rows, len(lengths)))
        for first in range(0, images, rows):
            yield slice(first, first + rows), captions, lengths[start]
        start = captions.stop
