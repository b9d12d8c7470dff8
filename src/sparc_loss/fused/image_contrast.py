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

The gradient by the patches is summed in float32 at least and rounded to their dtype once.
"""

from functools import partial
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from sparc_loss._arithmetic import autocast_disabled, full_precision_dtype
from sparc_loss._checks import check_features
from sparc_loss.functional import Alignment, AlignmentSettings, Reduction, available_negatives
from sparc_loss.fused.alignment import unit_and_norm, usable_patches_of, weights_and_gradient
from sparc_loss.fused.function import Gradients, fused_loss
from sparc_loss.fused.groups import Settings, groups_of


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
    function = partial(_loss_and_gradients, images=1 + available_negatives(image_negatives, len(patch_features)))
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
) -> tuple[Tensor, Gradients]:
    """See `fused.function.LossAndGradients`; `images` is 1 + K."""
    device, dtype = patch_features.device, full_precision_dtype(patch_features, token_features)
    scale = logit_scale.detach().reshape(()).to(device, dtype)
    loss, grad_scale = torch.zeros_like(scale), torch.zeros_like(scale)
    contiguous = torch.contiguous_format
    grad_patches = torch.zeros_like(patch_features, dtype=dtype, memory_format=contiguous) if wanted[0] else None
    grad_tokens = torch.zeros_like(token_features, memory_format=contiguous) if wanted[1] else None
    groups, _ = groups_of(valid_tokens, patch_features.shape, dtype.itemsize, settings, images)
    batch = len(valid_tokens)
    share: Tensor | float
    if settings.alignment.reduction == "token":
        share = 1 / valid_tokens.any(dim=1).sum().clamp(min=1).to(dtype)
    else:
        share = 1 / max(batch, 1)
    if patch_mask is not None:
        is_image, padding = patch_mask.any(dim=1), ~patch_mask
        # An image without a patch is scored with all patches, and its score is masked: the gradient has no 0/0.
        patch_mask = patch_mask | ~is_image[:, None]

    with autocast_disabled(device):
        for group in groups:
            t = group.tokens(token_features, dtype)
            number = group.numbers[:, None].clamp(min=1)
            tokens = _Tokens(t, *unit_and_norm(t), share=group.valid.to(dtype) / number)
            others = (group.captions[:, None] + torch.arange(images, device=device)) % batch
            scored = []
            for k, image in enumerate(others.unbind(dim=1)):
                usable = usable_patches_of(group, image, patch_mask, region_mask if k == 0 else None)
                v = patch_features[image].to(dtype)
                if patch_mask is not None:
                    v.masked_fill_(padding[image][..., None], 0)
                scored.append(_score(v, tokens, usable, settings.alignment, any(wanted[:2])))
            scores = torch.stack([each.score for each in scored], dim=1)
            logits = scores * scale
            if patch_mask is not None:
                logits.masked_fill_(~is_image[others], -torch.inf)
            log_sum = logits.logsumexp(dim=1)
            is_caption = group.numbers > 0
            loss += (log_sum - logits[:, 0]).where(is_caption, 0).sum() * share
            if not any(wanted):
                continue

            grad_logits = (logits - log_sum[:, None]).exp_()
            grad_logits[:, 0] -= 1
            grad_logits.masked_fill_(~is_caption[:, None], 0).mul_(share * weight)
            grad_scale += (grad_logits * scores).sum()
            by_score = rearrange(grad_logits * scale, "g images -> images g 1 1")
            if grad_tokens is not None:
                grad_t = torch.zeros_like(t)
                for w, each in zip(by_score, scored, strict=True):
                    grad_t.addcmul_(each.grad_t, w)
                grad_tokens[group.places] = grad_t.to(grad_tokens.dtype)
            if grad_patches is not None:
                for image, w, (_, a, g, h, _) in zip(others.unbind(1), by_score, scored, strict=True):
                    rows = torch.cat([a, g], dim=1).mul_(w)
                    grad_patches.index_add_(0, image, torch.bmm(rows.mT, torch.cat([h, t], dim=1)))
            del t, tokens, v, scored  # before those of the next group

    grad_scale = grad_scale.to(logit_scale.device, logit_scale.dtype).reshape(logit_scale.shape)
    if grad_patches is not None:
        grad_patches = grad_patches.to(patch_features.dtype)
    return loss, (grad_patches, grad_tokens, grad_scale if wanted[2] else None)


class _Tokens(NamedTuple):
    """The tokens t [G, N, D] of a group, their unit vectors and norms, and the share [G, N] of each in its score."""

    t: Tensor
    unit: Tensor
    norm: Tensor
    share: Tensor


class _Score(NamedTuple):
    """Scores [G] of captions on one image each, with a, g, h and their gradient by t; see the top for the letters."""

    score: Tensor
    a: Tensor
    g: Tensor
    h: Tensor
    grad_t: Tensor


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
