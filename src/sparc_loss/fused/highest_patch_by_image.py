"""`image_contrastive_loss` where each token has its highest patch alone, for devices on which asking would wait.

As highest_patch.py says, the weights have no gradient then. But whether two patches tie, which share the weight, is
known on the device only. So a weight of each patch stays: it is 1 for the highest patches, and the products with it
are right for ties too. Left out is the gradient by which patches tie: it is zero where they are equal, and where they
differ the loss has a step.

Images are processed in slices, each with the words of the 1 + K captions that are contrasted with it. No image is in
two slices, so that the gradient by the patches is written once, in their dtype. Three products are left of six; the
one that makes c is made twice, because all scores are known only after the first pass. Which patches are highest is
kept between the passes, a byte for each word and patch of the 1 + K images: B (1 + K) L P bytes beyond `chunk_bytes`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from einops import repeat
from torch import Tensor

from sparc_loss._arithmetic import autocast_disabled, full_precision_dtype
from sparc_loss.functional import Direction, images_of_captions
from sparc_loss.fused.alignment import unit_and_norm, weights_and_gradient
from sparc_loss.fused.contrast import contrast, share_of_caption
from sparc_loss.fused.function import Gradients
from sparc_loss.fused.groups import Settings

# More is no faster: a slice of so many bytes fills a GPU.
_CHUNK_BYTES = 2**29


def highest_patch_loss_and_gradients(
    patch_features: Tensor,
    token_features: Tensor,
    logit_scale: Tensor,
    valid_tokens: Tensor,
    patch_mask: Tensor | None,
    region_mask: Tensor | None,
    settings: Settings,
    wanted: tuple[bool, bool, bool],
    weight: Tensor | float,
    images: int,
    direction: Direction,
) -> tuple[Tensor, Gradients]:
    """See `fused.function.LossAndGradients`; `images` is 1 + K."""
    device, dtype = patch_features.device, full_precision_dtype(patch_features, token_features)
    batch, length = valid_tokens.shape
    scale = logit_scale.detach().reshape(()).to(device, dtype)
    numbers = valid_tokens.sum(dim=1)
    share_of_token = valid_tokens.to(dtype) / numbers[:, None].clamp(min=1)
    contiguous = torch.contiguous_format
    grad_patches = torch.empty_like(patch_features, memory_format=contiguous) if wanted[0] else None
    grad_tokens = torch.zeros_like(token_features, dtype=dtype, memory_format=contiguous) if wanted[1] else None
    scores = torch.zeros(batch, images, dtype=dtype, device=device)
    slices = list(_slices(batch, patch_features.shape, length, images, settings.chunk_bytes, dtype, device))
    is_highest = []

    with autocast_disabled(device):
        for each in slices:
            v, t = each.patches(patch_features, patch_mask, dtype), each.words(token_features, valid_tokens, dtype)
            usable = each.usable(valid_tokens, patch_mask, region_mask)
            highest = weights_and_gradient(torch.bmm(t, v.mT), usable, settings.alignment)[0] > 0
            if any(wanted[:2]):
                is_highest.append(highest)
            unit, c_unit = unit_and_norm(t)[0], unit_and_norm(torch.bmm(_weights(highest, dtype), v))[0]
            of_words = (unit * c_unit).sum(dim=-1) * each.of_captions(share_of_token)
            scores[each.captions, each.columns] = of_words.unflatten(1, (images, length)).sum(dim=-1)
            del v, t, unit, c_unit  # before those of the next slice

        is_caption = numbers > 0
        share = share_of_caption(is_caption, settings.alignment.reduction, dtype)
        others = images_of_captions(batch, images, device)
        without_patch = None if patch_mask is None else ~patch_mask.any(dim=1)[others]
        loss, grad_scores, grad_scale = contrast(scores, scale, is_caption, without_patch, direction, share)

        grad_scores = grad_scores * weight
        for each, highest in zip(slices, is_highest, strict=False):
            v, t = each.patches(patch_features, patch_mask, dtype), each.words(token_features, valid_tokens, dtype)
            a = _weights(highest, dtype)
            unit, norm = unit_and_norm(t)
            c_unit, c_norm = unit_and_norm(torch.bmm(a, v))
            cosine = (unit * c_unit).sum(dim=-1, keepdim=True)
            by_score = repeat(grad_scores[each.captions, each.columns], "i k -> i (k l) 1", l=length)
            by_score = by_score * each.of_captions(share_of_token)[..., None]
            if grad_patches is not None:
                h = torch.addcmul(unit, cosine, c_unit, value=-1).mul_(by_score / c_norm)
                grad_patches[each.images] = torch.bmm(a.mT, h).to(grad_patches.dtype)
            if grad_tokens is not None:
                grad_t = c_unit.addcmul_(cosine, unit, value=-1).mul_(by_score / norm)
                # One column at a time: no caption is in it twice, so that the order of the sums is always the same.
                for captions, part in zip(each.captions.unbind(1), grad_t.chunk(images, dim=1), strict=True):
                    grad_tokens.index_add_(0, captions, part)
            del v, t, a, unit, c_unit
    grad_scale = (grad_scale * weight).to(logit_scale.device, logit_scale.dtype).reshape(logit_scale.shape)
    if grad_tokens is not None:
        grad_tokens = grad_tokens.to(token_features.dtype)
    return loss, (grad_patches, grad_tokens, grad_scale if wanted[2] else None)


class _Slice(NamedTuple):
    """Images I, and the captions that score each.

    Attributes:
        images: of the batch.
        captions: int64 [I, 1 + K]; the captions in column k score their k-th image.
        columns: int64 [1 + K].
    """

    images: slice
    captions: Tensor
    columns: Tensor

    def patches(self, patch_features: Tensor, patch_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """[I, P, D], zero where they are masked."""
        v = patch_features[self.images].to(dtype)
        return v if patch_mask is None else v.masked_fill(~patch_mask[self.images, :, None], 0)

    def words(self, token_features: Tensor, valid_tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """The tokens [I, (1 + K) L, D] of the captions, zero where they are not valid."""
        t = self.of_captions(token_features).to(dtype)
        return t.masked_fill_(~self.of_captions(valid_tokens)[..., None], 0)

    def of_captions(self, values: Tensor) -> Tensor:
        """Values [B, L, ...] of tokens as [I, (1 + K) L, ...]."""
        return values[self.captions].flatten(1, 2)

    def usable(self, valid_tokens: Tensor, patch_mask: Tensor | None, region_mask: Tensor | None) -> Tensor | None:
        """The patches that each word may use, bool broadcastable to [I, (1 + K) L, P]; None is all."""
        usable = None
        if patch_mask is not None:
            # An image without a patch is scored with all patches, and its score is masked.
            mask = patch_mask[self.images]
            usable = (mask | ~mask.any(dim=1, keepdim=True))[:, None]
        if region_mask is not None:
            regions = region_mask[self.images]
            others = torch.ones_like(regions[:, :1]).expand(-1, regions.shape[1] * (len(self.columns) - 1), -1)
            regions = torch.cat([regions, others], dim=1)  # the column 0 is the caption of the image itself
            usable = regions if usable is None else usable & regions
        # The rows of masked tokens use every patch, so that they have no 0/0.
        return usable if usable is None else usable | ~self.of_captions(valid_tokens)[..., None]


def _slices(
    batch: int,
    shape: torch.Size,
    length: int,
    images: int,
    chunk_bytes: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[_Slice]:
    _, patches, dim = shape
    words = images * length
    # Four [words, D] and five [words, P], the patches and their gradient.
    workspace = dtype.itemsize * (words * (4 * dim + 5 * patches) + 2 * patches * dim)
    size = max(1, int(min(chunk_bytes, _CHUNK_BYTES) // workspace))
    columns = torch.arange(images, device=device)
    for start in range(0, batch, size):
        here = torch.arange(start, min(start + size, batch), device=device)
        yield _Slice(slice(start, start + size), (here[:, None] - columns) % batch, columns)


def _weights(highest: Tensor, dtype: torch.dtype) -> Tensor:
    """Eq. 4: equal weights of the highest patches of a word."""
    weights = highest.to(dtype)
    return weights.div_(weights.sum(dim=-1, keepdim=True))
