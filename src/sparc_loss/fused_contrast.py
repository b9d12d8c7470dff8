"""The contrast with other images for little more than its matrix products: `functional.image_contrastive_loss`.

It is to that function what `fused.py` is to the fine-grained loss, in the same groups of captions of about the same
length and with the same letters. Where this file and `functional.py` differ, this file is wrong.

**The gradient of one score.** Caption i scores image k by S = (1/n) sum_l cos(t_l, c_l) over its n tokens. By c_l that
has the gradient

    h_l = (t^_l - cos(t_l, c_l) c^_l) / (n |c_l|),

at right angles to c_l, so what cancels in `fused.py` cancels here: g comes from r = h v^T as there, and
grad v = [a; g]^T [h; t], grad t = g v + (t's part, as h with t and c exchanged).

**What waits for the other images.** The loss weighs the gradient of S_ik by w_ik, logit_scale times row i's softmax
less its target, which is known only when all 1 + K images of the caption have been scored. It is one number for a
caption and an image, so nothing has to be computed again: a, g, h and grad t of weight one wait in the workspace, the
patches do not. Then grad t is summed over images, and grad v = w [a; g]^T [h; t] is added to that of its image, which
other captions share. These are six multiply-adds for every valid token, patch, dimension and image: (1 + K) times
those of one alignment and its gradient.

The gradient by the patches is summed in float32 at least, and rounded to their dtype once.
"""

from functools import partial

import torch
from einops import rearrange
from torch import Tensor

from sparc_loss._validation import check_features
from sparc_loss.functional import Alignment, Reduction, autocast_disabled, available_negatives
from sparc_loss.fused import Gradients, _checked_and_applied, _groups, _Settings, _unit, _usable, _weights


# As in `fused`: a compiled caller breaks its graph here, and goes on after it.
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
    """`functional.image_contrastive_loss`, with first derivatives only; see `fused.fine_grained_loss`.

    Args:
        patch_features: [B, P, D], not normalised.
        token_features: [B, L, D], not normalised.
        token_mask: bool [B, L], True for the tokens that count.
        logit_scale: 1/tau, a number or a tensor of one element.
        image_negatives: K, at least 1; as many as there are where the batch has fewer other images.
        threshold: sigma of Eq. 3, in [0, 1]; None is 1/P.
        alignment: "sparse", "dense" or "softmax", see `functional.alignment_weights`.
        reduction: "token" or "sample", see `functional.image_contrastive_loss`.
        patch_mask: bool [B, P], False for padding patches.
        region_mask: bool [B, L, P], True for the patches of its own image that a token may use.
        chunk_bytes: bound in bytes of the workspace of one group of captions, see `fused.fine_grained_loss`. Beside
            it, patches of less than 32 bits have a gradient [B, P, D] in float32 until it is rounded.
        recompute: hold nothing but the inputs between forward and backward, for a third more multiplications.

    Returns:
        Scalar, float32 (float64 if a feature is).

    Raises:
        TypeError: features not floating point, a mask not bool, a threshold that is no number, a K that is not whole.
        ValueError: wrong shapes or devices, a threshold outside [0, 1], an unknown alignment or reduction, a
            chunk_bytes below 1, a K below 1.
        RuntimeError: as `fused.fine_grained_loss`.
    """
    check_features("b p d, b l d", patch_features=patch_features, token_features=token_features)
    images = 1 + available_negatives(image_negatives, len(patch_features))
    return _checked_and_applied(
        partial(_loss_and_gradients, images=images),
        patch_features,
        token_features,
        token_mask,
        logit_scale,
        threshold,
        alignment,
        reduction,
        patch_mask,
        region_mask,
        chunk_bytes,
        recompute,
    )


def _loss_and_gradients(
    patch_features: Tensor,
    token_features: Tensor,
    logit_scale: Tensor,
    countable: Tensor,
    patch_mask: Tensor | None,
    region_mask: Tensor | None,
    settings: _Settings,
    wanted: tuple[bool, bool, bool],
    weight: Tensor | float = 1.0,
    *,
    images: int,
) -> tuple[Tensor, Gradients]:
    """The loss, and `weight` times its gradient by patch_features, token_features and logit_scale where wanted."""
    (batch, patches, dim), device = patch_features.shape, patch_features.device
    dtype = torch.promote_types(torch.promote_types(patch_features.dtype, token_features.dtype), torch.float32)
    scale = logit_scale.detach().reshape(()).to(device, dtype)
    loss, grad_scale = torch.zeros_like(scale), torch.zeros_like(scale)
    contiguous = {"memory_format": torch.contiguous_format}
    grad_patches = torch.zeros_like(patch_features, dtype=dtype, **contiguous) if wanted[0] else None
    grad_tokens = torch.zeros_like(token_features, **contiguous) if wanted[1] else None

    numbers, captions = countable.sum(dim=1).sort()
    positions = countable.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    share = 1 / ((numbers > 0).sum().clamp(min=1).to(dtype) if settings.reduction == "token" else max(batch, 1))
    if patch_mask is not None:
        is_image, padding = patch_mask.any(dim=1), ~patch_mask
        # One without a patch is scored as if it had all, and its score left out: no 0/0 reaches the gradient.
        patch_mask = patch_mask | ~is_image[:, None]

    with autocast_disabled(device):
        for group, longest in _groups(numbers.tolist(), patches, dim, dtype.itemsize, settings, images):
            chosen, number = captions[group], numbers[group]
            places = positions[chosen, :longest]
            counts = torch.arange(longest, device=device) < number[:, None]
            t = token_features[chosen[:, None], places].to(dtype).masked_fill_(~counts[..., None], 0)
            t_unit, t_norm = _unit(t)
            share_of_token = counts.to(dtype) / number[:, None]

            others = (chosen[:, None] + torch.arange(images, device=device)) % batch
            scored = []
            for k, image in enumerate(others.unbind(dim=1)):
                usable = _usable((image[:, None], places), counts, patch_mask, region_mask if k == 0 else None)
                v = patch_features[image].to(dtype)
                if patch_mask is not None:
                    v.masked_fill_(padding[image][..., None], 0)
                scored.append(_score(v, t, t_unit, t_norm, share_of_token, usable, settings, any(wanted[:2])))
            scores = torch.stack([score for score, *_ in scored], dim=1)
            logits = scores * scale
            if patch_mask is not None:
                logits.masked_fill_(~is_image[others], -torch.inf)
            log_sum = logits.logsumexp(dim=1)
            loss += (log_sum - logits[:, 0]).sum() * share
            if not any(wanted):
                continue

            grad_logits = (logits - log_sum[:, None]).exp_()
            grad_logits[:, 0] -= 1
            grad_logits *= share * weight
            grad_scale += (grad_logits * scores).sum()
            by_score = grad_logits * scale
            if grad_tokens is not None:
                grad_t = sum(w[:, None, None] * each for w, (*_, each) in zip(by_score.unbind(1), scored, strict=True))
                grad_tokens[chosen[:, None], places] = grad_t.to(grad_tokens.dtype)
            if grad_patches is not None:
                for image, w, (_, a, g, h, _) in zip(others.unbind(1), by_score.unbind(1), scored, strict=True):
                    rows = torch.cat([a, g], dim=1).mul_(w[:, None, None])
                    grad_patches.index_add_(0, image, torch.bmm(rows.mT, torch.cat([h, t], dim=1)))
            del t, t_unit, v, scored  # before the next group's

    grad_scale = grad_scale.to(logit_scale.device, logit_scale.dtype).reshape(logit_scale.shape)
    if grad_patches is not None:
        grad_patches = grad_patches.to(patch_features.dtype)
    return loss, (grad_patches, grad_tokens, grad_scale if wanted[2] else None)


def _score(
    v: Tensor,
    t: Tensor,
    t_unit: Tensor,
    t_norm: Tensor,
    share: Tensor,
    usable: Tensor | None,
    settings: _Settings,
    want_gradient: bool,
) -> tuple[Tensor, ...]:
    """Scores [B] of captions on one image each and, where wanted, a, g, h and the scores' gradient by t.

    v [B, P, D] patches; t [B, L, D] tokens, with `_unit` of them; share [B, L] of a token in the mean, or 0.
    """
    a, similarity_gradient = _weights(torch.bmm(t, v.mT), usable, settings)
    c_unit, c_norm = _unit(torch.bmm(a, v))
    cosine = (c_unit * t_unit).sum(dim=-1)
    score = (cosine * share).sum(dim=-1)
    if not want_gradient:
        return (score,)
    cosine, share = rearrange(cosine, "b l -> b l 1"), rearrange(share, "b l -> b l 1")
    h = (t_unit - cosine * c_unit).mul_(share / c_norm)
    grad_t = (c_unit - cosine * t_unit).mul_(share / t_norm)
    g = similarity_gradient(torch.bmm(h, v.mT))
    return score, a, g, h, torch.baddbmm(grad_t, g, v)
