"""`functional.image_contrastive_loss` at little more than the cost of its matrix products.

It uses the groups, the letters and the alignment of the fine-grained loss. `functional` is the reference: where this
file differs from it, this file is wrong.

**The gradient of one score.** Caption i scores image k by S = (1/n) sum_l cos(t_l, c_l) over its n tokens. The
gradient of S by c_l,

    h_l = (t^_l - cos(t_l, c_l) c^_l) / (n |c_l|),

is orthogonal to c_l. So the same terms cancel as in fine_grained.py: g follows from r = h v^T in the same way, and
grad v = [a; g]^T [h; t], grad t = g v + (the part of t, like h with t and c exchanged).

**What is kept until all images are scored.** The loss multiplies the gradient of S_ik by w_ik, which is logit_scale
times row i's softmax less its target. It is known only when all 1 + K images of the caption have been scored. As it is
one number per caption and image, nothing has to be computed again: a, g, h and grad t for w_ik = 1 stay in the
workspace, the patches do not. Then grad t is summed over images, and grad v = w [a; g]^T [h; t] is added to the
gradient of its image, which other captions score too. The cost is six multiply-adds for every valid token, patch,
dimension and image: (1 + K) times the cost of one alignment and its gradient.

**In both directions** w_ik has a second part, from the softmax of image k over the captions that score it. These are
in other groups too. So all scores are computed first, without anything that gradients need, and the groups are gone
through once more: eight multiply-adds instead of six.

The gradient by the patches is summed in float32 at least and rounded to their dtype once.
"""

from functools import partial
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from sparc_loss._arithmetic import autocast_disabled, full_precision_dtype
from sparc_loss._checks import check_choice, check_features
from sparc_loss.functional import (
    DIRECTIONS,
    Alignment,
    AlignmentSettings,
    Direction,
    Reduction,
    available_negatives,
    images_of_captions,
)
from sparc_loss.fused import highest_patch, highest_patch_by_image
from sparc_loss.fused.alignment import unit_and_norm, usable_patches_of, weights_and_gradient
from sparc_loss.fused.contrast import contrast, share_of_caption
from sparc_loss.fused.function import Gradients, fused_loss
from sparc_loss.fused.groups import Group, Settings, groups_of


# As for the fine-grained loss, torch.compile breaks its graph here.
@torch.compiler.disable
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
    chunk_bytes: int | None = None,
    recompute: bool = False,
) -> Tensor:
    """`functional.image_contrastive_loss` with first derivatives only; see `fused.fine_grained_loss`.

    The arguments are those of `functional.image_contrastive_loss`, and `chunk_bytes` and `recompute` as in
    `fused.fine_grained_loss`. Patches of less than 32 bits also have a gradient [B, P, D] in float32 until it is
    rounded.

    Raises:
        TypeError, ValueError: as `functional.image_contrastive_loss`; a chunk_bytes below 1.
        RuntimeError: as `fused.fine_grained_loss`.
    """
    check_features("b p d, b l d", patch_features=patch_features, token_features=token_features)
    check_choice("direction", direction, DIRECTIONS)
    images = 1 + available_negatives(image_negatives, len(patch_features))
    function = partial(_loss_and_gradients, images=images, direction=direction)
    settings = AlignmentSettings(threshold, alignment, reduction)
    features = patch_features, token_features, token_mask, logit_scale
    return fused_loss(function, *features, patch_mask, region_mask, settings, chunk_bytes, recompute)


def _loss_and_gradients(
    patch_features: Tensor,
    token_features: Tensor,
    logit_scale: Tensor,
    valid_tokens: Tensor,
    patch_mask: Tensor | None,
    region_mask: Tensor | None,
    settings: Settings,
    wanted: tuple[bool, bool, bool],
    weight: Tensor | float = 1.0,
    *,
    images: int,
    direction: Direction,
) -> tuple[Tensor, Gradients]:
    """See `fused.function.LossAndGradients`; `images` is 1 + K."""
    alignment = settings.alignment
    if alignment.alignment == "sparse" and alignment.threshold == 1:
        masks = valid_tokens, patch_mask, region_mask
        arguments = patch_features, token_features, logit_scale, *masks, settings, wanted, weight, images, direction
        if patch_features.device.type != "cpu":
            return highest_patch_by_image.highest_patch_loss_and_gradients(*arguments)
        result = highest_patch.highest_patch_loss_and_gradients(*arguments)
        if result is not None:
            return result
    device, dtype = patch_features.device, full_precision_dtype(patch_features, token_features)
    scale = logit_scale.detach().reshape(()).to(device, dtype)
    contiguous = torch.contiguous_format
    grad_patches = torch.zeros_like(patch_features, dtype=dtype, memory_format=contiguous) if wanted[0] else None
    grad_tokens = torch.zeros_like(token_features, memory_format=contiguous) if wanted[1] else None
    groups, _ = groups_of(valid_tokens, patch_features.shape, dtype.itemsize, settings, images)
    batch = len(valid_tokens)
    captions = valid_tokens.any(dim=1)
    share = share_of_caption(captions, settings.alignment.reduction, dtype)
    others = images_of_captions(batch, images, device)
    aligned = _Images(patch_features, patch_mask, region_mask, settings.alignment, dtype)
    all_scores = torch.zeros(batch, images, dtype=dtype, device=device)
    loss, grad_scale = torch.zeros_like(scale), torch.zeros_like(scale)

    with autocast_disabled(device):
        if direction == "both":
            # An image is scored by captions of other groups: its softmax needs all scores before any gradient.
            for group in groups:
                tokens = _tokens_of(group, token_features, dtype)
                scored = aligned.score(group, tokens, others[group.captions], want=False)
                all_scores[group.captions] = torch.stack([each.score for each in scored], dim=1)
            loss, grad_scores, grad_scale = contrast(
                all_scores, scale, captions, aligned.without_patch(others), direction, share
            )
            if not any(wanted):
                groups = []
        for group in groups:
            tokens = _tokens_of(group, token_features, dtype)
            own = others[group.captions]
            scored = aligned.score(group, tokens, own, any(wanted[:2]))
            if direction == "both":
                grad_group = grad_scores[group.captions]
            else:
                scores = torch.stack([each.score for each in scored], dim=1)
                part, grad_group, grad_part = contrast(
                    scores, scale, group.numbers > 0, aligned.without_patch(own), direction, share
                )
                loss, grad_scale = loss + part, grad_scale + grad_part
            by_score = rearrange(grad_group * weight, "g images -> images g 1 1")
            if grad_tokens is not None:
                grad_t = torch.zeros_like(tokens.t)
                for w, each in zip(by_score, scored, strict=True):
                    grad_t.addcmul_(each.grad_t, w)
                grad_tokens[group.places] = grad_t.to(grad_tokens.dtype)
            if grad_patches is not None:
                for image, w, each in zip(own.unbind(1), by_score, scored, strict=True):
                    each.add_to(grad_patches, image, tokens.t, w)
            del tokens, scored  # before those of the next group

    grad_scale = (grad_scale * weight).to(logit_scale.device, logit_scale.dtype).reshape(logit_scale.shape)
    if grad_patches is not None:
        grad_patches = grad_patches.to(patch_features.dtype)
    return loss, (grad_patches, grad_tokens, grad_scale if wanted[2] else None)


class _Tokens(NamedTuple):
    """The tokens t [G, N, D] of a group, their unit vectors and norms, and the share [G, N] of each in its score."""

    t: Tensor
    unit: Tensor
    norm: Tensor
    share: Tensor


def _tokens_of(group: Group, token_features: Tensor, dtype: torch.dtype) -> _Tokens:
    t = group.tokens(token_features, dtype)
    return _Tokens(t, *unit_and_norm(t), share=group.valid.to(dtype) / group.numbers[:, None].clamp(min=1))


class _Score(NamedTuple):
    """Scores [G] of captions on one image each, with a, g, h and their gradient by t; see the top for the letters."""

    score: Tensor
    a: Tensor
    g: Tensor
    h: Tensor
    grad_t: Tensor

    def add_to(self, grad_patches: Tensor, image: Tensor, t: Tensor, w: Tensor) -> None:
        """Add the gradient by the patches of the `image` [G] of each caption, `w` [G, 1, 1] times."""
        rows = torch.cat([self.a, self.g], dim=1).mul_(w)
        grad_patches.index_add_(0, image, torch.bmm(rows.mT, torch.cat([self.h, t], dim=1)))


class _Images:
    """The images that captions are scored on.

    Args:
        patch_features: [B, P, D].
        patch_mask: bool [B, P] or None.
        region_mask: bool [B, L, P] or None, of a caption's own image.
        settings: of the alignment.
        dtype: of the arithmetic.
    """

    def __init__(
        self,
        patch_features: Tensor,
        patch_mask: Tensor | None,
        region_mask: Tensor | None,
        settings: AlignmentSettings,
        dtype: torch.dtype,
    ) -> None:
        self.patch_features, self.region_mask, self.settings, self.dtype = patch_features, region_mask, settings, dtype
        self.patch_mask = patch_mask
        if patch_mask is not None:
            self.padding, self.is_image = ~patch_mask, patch_mask.any(dim=1)
            # An image without a patch is scored with all patches, and its score is masked: the gradient has no 0/0.
            self.patch_mask = patch_mask | self.padding.all(dim=1, keepdim=True)

    def without_patch(self, images: Tensor) -> Tensor | None:
        """Which of the images [G, 1 + K] have no valid patch; None is none."""
        return None if self.patch_mask is None else ~self.is_image[images]

    def score(self, group: Group, tokens: _Tokens, images: Tensor, want: bool) -> list[_Score]:
        """The scores of the group's captions on each of the images [G, 1 + K]; for the gradients too if `want`."""
        scored = []
        for k, image in enumerate(images.unbind(dim=1)):
            usable = usable_patches_of(group, image, self.patch_mask, self.region_mask if k == 0 else None)
            v = self.patch_features[image].to(self.dtype)
            if self.patch_mask is not None:
                v.masked_fill_(self.padding[image][..., None], 0)
            scored.append(_score(v, tokens, usable, self.settings, want))
        return scored


def _score(v: Tensor, tokens: _Tokens, usable: Tensor | None, settings: AlignmentSettings, want: bool) -> _Score:
    """Score the patches v [G, P, D] of one image per caption."""
    a, similarity_gradient = weights_and_gradient(torch.bmm(tokens.t, v.mT), usable, settings)
    c_unit, c_norm = unit_and_norm(torch.bmm(a, v))
    cosine = (c_unit * tokens.unit).sum(dim=-1)
    score = (cosine * tokens.share).sum(dim=-1)
    if not want:
        return _Score(score, a, a, a, a)
    cosine, share = rearrange(cosine, "b l -> b l 1"), rearrange(tokens.share, "b l -> b l 1")
    h = (tokens.unit - cosine * c_unit).mul_(share / c_norm)
    grad_t = (c_unit - cosine * tokens.unit).mul_(share / tokens.norm)
    g = similarity_gradient(torch.bmm(h, v.mT))
    return _Score(score, a, g, h, torch.baddbmm(grad_t, g, v))
