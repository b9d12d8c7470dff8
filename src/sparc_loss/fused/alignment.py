"""Eqs. 2 to 5 for a group of captions, and the gradient by the similarities; see fine_grained.py for its derivation.

Letters: v [G, P, D] patches, t [G, N, D] tokens, a [G, N, P] weights, c [G, N, D] groups of patches, h the gradient by
c and g that by the similarities.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sparc_loss.functional import AlignmentSettings
from sparc_loss.fused.groups import Group


def usable_patches_of(
    group: Group, images: Tensor, patch_mask: Tensor | None, region_mask: Tensor | None
) -> Tensor | None:
    """The patches of the given `images` [G] that each token may use, bool broadcastable to [G, N, P]; None is all."""
    if patch_mask is None and region_mask is None:
        return None
    usable = torch.ones_like(group.valid[..., None]) if region_mask is None else region_mask[group.places]
    if patch_mask is not None:
        usable = usable & patch_mask[images, None]
    # The rows of masked tokens use every patch, so that they have no 0/0.
    return usable | ~group.valid[..., None]


def weights_and_gradient(
    similarity: Tensor, usable: Tensor | None, settings: AlignmentSettings
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Eqs. 2 to 4, and the function from the gradient by the weights to the gradient by the similarities.

    Both overwrite their argument. The function assumes that the loss does not depend on the length of c.
    """
    if settings.alignment == "softmax":
        return _softmax(similarity, usable)
    if usable is None:
        lowest, highest = torch.aminmax(similarity, dim=-1, keepdim=True)
        number = lowest.new_full((1,), similarity.shape[-1])
    else:
        lowest = similarity.masked_fill(~usable, torch.inf).amin(dim=-1, keepdim=True)
        highest = similarity.masked_fill(~usable, -torch.inf).amax(dim=-1, keepdim=True)
        number = usable.sum(dim=-1, keepdim=True, dtype=similarity.dtype)
    spread = highest - lowest
    flat = spread == 0
    similarity -= lowest
    is_lowest = similarity == 0
    weights = similarity.div_(spread.masked_fill(flat, 1)).masked_fill_(flat, 1)
    dropped = None if usable is None else ~usable
    if settings.alignment == "sparse":
        below = weights < (1 / number if settings.threshold is None else settings.threshold)
        dropped = below if dropped is None else below | dropped
    if usable is not None:
        is_lowest &= usable
    if dropped is not None:
        weights.masked_fill_(dropped, 0)
    total = weights.sum(dim=-1, keepdim=True)
    weights /= total

    def similarity_gradient(gradient: Tensor) -> Tensor:
        if dropped is not None:
            gradient.masked_fill_(dropped, 0)
        gradient /= (total * spread).masked_fill_(flat, torch.inf)
        share = gradient.sum(dim=-1, keepdim=True) / is_lowest.sum(dim=-1, keepdim=True)
        return gradient.addcmul_(is_lowest, share, value=-1)

    return weights, similarity_gradient


def _softmax(similarity: Tensor, usable: Tensor | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    if usable is not None:
        similarity.masked_fill_(~usable, -torch.inf)
    weights = similarity.softmax(dim=-1)

    def similarity_gradient(gradient: Tensor) -> Tensor:
        # h . c is zero except for rounding errors, which peaked weights amplify: nearly equal numbers are subtracted.
        gradient -= (gradient * weights).sum(dim=-1, keepdim=True)
        return gradient.mul_(weights)

    return weights, similarity_gradient


def unit_and_norm(features: Tensor) -> tuple[Tensor, Tensor]:
    """The unit vectors of `functional`, and the norms [..., 1] by which their gradient is divided."""
    largest = torch.linalg.vector_norm(features, torch.inf, dim=-1, keepdim=True)
    is_zero = largest == 0
    largest.masked_fill_(is_zero, 1)
    unit = features / largest
    norm = torch.linalg.vector_norm(unit, dim=-1, keepdim=True).masked_fill_(is_zero, features.shape[-1] ** 0.5)
    return unit.div_(norm), largest.mul_(norm)
