"""`image_contrastive_loss` where each token has its highest patch alone: a threshold of 1.

Then c_l is one patch of image k, the highest by t_l . v. A little change of t or v changes none of the choices, so the
weights have no gradient, and the gradient of a score is that of the cosines of n pairs of vectors. What is left of six
multiply-adds for every token, patch, dimension and image is one, to find the highest patch.

For that product the loop turns round: an image is multiplied with the words of all 1 + K captions that are contrasted
with it. They are neighbours in the batch, so that they are a slice of the packed words, and no patch is copied. Which
patch is the highest is one number for each word and image; all else is gathered by it, in slices of the words.

For a CPU: to ask whether two patches tie, which then share the weight, would wait for a GPU.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sparc_loss._arithmetic import autocast_disabled, full_precision_dtype
from sparc_loss._masks import zero_where_masked
from sparc_loss.functional import Direction, images_of_captions
from sparc_loss.fused.alignment import unit_and_norm
from sparc_loss.fused.contrast import contrast, share_of_caption
from sparc_loss.fused.function import Gradients
from sparc_loss.fused.groups import Settings


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
) -> tuple[Tensor, Gradients] | None:
    """See `fused.function.LossAndGradients`; `images` is 1 + K. None if a token has several highest patches."""
    dtype = full_precision_dtype(patch_features, token_features)
    has_patch = None if patch_mask is None else patch_mask.any(dim=1)
    if has_patch is not None and not has_patch.all():
        # A word stands with a masked patch where its image has no other, and NaN there is NaN times a gradient of 0.
        patch_features = zero_where_masked(patch_features, patch_mask)
    batch, patches, dim = patch_features.shape
    scale = logit_scale.detach().reshape(()).to(dtype)
    captions, positions = valid_tokens.nonzero(as_tuple=True)
    numbers = valid_tokens.sum(dim=1)
    with autocast_disabled(patch_features.device):
        words = token_features[captions, positions].to(dtype)
        highest = _highest_patches(
            patch_features, words, captions, positions, numbers, patch_mask, region_mask, images
        )
        if highest is None:
            return None
        flat = patch_features.reshape(batch * patches, dim)
        others = images_of_captions(batch, images, valid_tokens.device)
        share_of_word = 1 / numbers[captions].to(dtype)
        slices = _slices(len(words), dim, settings.chunk_bytes, dtype.itemsize)

        scores = torch.zeros(batch, images, dtype=dtype)
        for part in slices:
            unit = unit_and_norm(words[part])[0]
            for k in range(images):
                c_unit = unit_and_norm(flat[highest[part, k]].to(dtype))[0]
                scores[:, k].index_add_(0, captions[part], (unit * c_unit).sum(dim=-1) * share_of_word[part])
        is_caption = numbers > 0
        share = share_of_caption(is_caption, settings.alignment.reduction, dtype)
        without_patch = None if has_patch is None else ~has_patch[others]
        loss, grad_scores, grad_scale = contrast(scores, scale, is_caption, without_patch, direction, share)

        grad_patches = torch.zeros(batch * patches, dim, dtype=dtype) if wanted[0] else None
        grad_words = torch.zeros_like(words) if wanted[1] else None
        for part in slices if wanted[0] or wanted[1] else ():
            unit, norm = unit_and_norm(words[part])
            for k in range(images):
                c_unit, c_norm = unit_and_norm(flat[highest[part, k]].to(dtype))
                cosine = (unit * c_unit).sum(dim=-1, keepdim=True)
                w = (grad_scores[captions[part], k] * share_of_word[part] * weight)[:, None]
                if grad_patches is not None:
                    grad_patches.index_add_(0, highest[part, k], (unit - cosine * c_unit).mul_(w / c_norm))
                if grad_words is not None:
                    grad_words[part] += (c_unit - cosine * unit).mul_(w / norm)
    grad_tokens = None
    if grad_words is not None:
        grad_tokens = torch.zeros_like(token_features, memory_format=torch.contiguous_format)
        grad_tokens[captions, positions] = grad_words.to(grad_tokens.dtype)
    if grad_patches is not None:
        grad_patches = grad_patches.view(batch, patches, dim).to(patch_features.dtype)
    grad_scale = (grad_scale * weight).to(logit_scale.device, logit_scale.dtype).reshape(logit_scale.shape)
    return loss, (grad_patches, grad_tokens, grad_scale if wanted[2] else None)


def _highest_patches(
    patch_features: Tensor,
    words: Tensor,
    captions: Tensor,
    positions: Tensor,
    numbers: Tensor,
    patch_mask: Tensor | None,
    region_mask: Tensor | None,
    images: int,
) -> Tensor | None:
    """For each word [M] and each image of its caption, the highest patch, int64 [M, 1 + K], counted over all images.

    None if a word has several highest patches in an image.
    """
    batch, patches, _ = patch_features.shape
    ends = [0, *numbers.cumsum(dim=0).tolist()]
    highest = torch.zeros(len(words), images, dtype=torch.long)
    for image in range(batch):
        usable_patches = None if patch_mask is None else patch_mask[image]
        if usable_patches is not None and not usable_patches.any():
            continue  # its scores are masked
        v = patch_features[image].to(words.dtype)
        for first, last in _neighbours(image, images, batch):
            part = slice(ends[first], ends[last + 1])
            if part.start == part.stop:
                continue
            similarity = words[part] @ v.T
            usable = None if usable_patches is None else usable_patches.expand_as(similarity)
            own = captions[part] == image
            if region_mask is not None and own.any():
                regions = torch.ones_like(similarity, dtype=torch.bool)
                regions[own] = region_mask[image, positions[part][own]]
                usable = regions if usable is None else usable & regions
            lowest = similarity if usable is None else similarity.masked_fill(~usable, torch.inf)
            if usable is not None:
                similarity = similarity.masked_fill(~usable, -torch.inf)
            largest, place = similarity.max(dim=-1, keepdim=True)
            minimum = lowest.amin(dim=-1, keepdim=True)
            # As Eq. 2 rounds: a patch that is nearly as high may also have the weight 1.
            if ((similarity - minimum == largest - minimum).sum(dim=-1) != 1).any():
                return None
            columns = (image - captions[part]) % batch
            highest[torch.arange(part.start, part.stop), columns] = image * patches + place[:, 0]
    return highest


def _neighbours(image: int, images: int, batch: int) -> Iterator[tuple[int, int]]:
    """The captions that score an image, it and the K before it, as ranges of first and last that do not wrap."""
    first = image - images + 1
    if first < 0:
        yield first + batch, batch - 1
    yield max(first, 0), image


def _slices(words: int, dim: int, chunk_bytes: float, itemsize: int) -> list[slice]:
    """Slices of the words whose workspace, eight [m, D], keeps the bound."""
    size = max(1, int(chunk_bytes // (8 * dim * itemsize)))
    return [slice(start, min(start + size, words)) for start in range(0, words, size)]
