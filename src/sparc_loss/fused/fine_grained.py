"""The fine-grained loss at little more than the cost of its matrix products.

`functional.fine_grained_loss` is the reference: where this file differs from it, this file is wrong.

**Why it is cheap.** The batch is processed in groups of captions of similar length (groups.py), so masked tokens cost
almost nothing. The gradient is written by hand: nothing of the workspace is kept, and the patches of a group are still
in the cache of the CPU when they are needed again.

**What cancels.** For one token, let s_p be its similarities, m and M their minimum and maximum over the n patches it
may use, kept_p the test of Eq. 3, and u_p = kept_p (s_p - m) / (M - m). Then Eqs. 2 to 5 are

    a_p = u_p / z,  z = sum_p u_p,  c = sum_p a_p v_p,

and Eq. 6 depends only on the direction of c. Let h be the gradient of the loss by c. Scaling c changes nothing, so
h . c = 0. The gradient by a_p is r_p = h . v_p, and sum_p a_p r_p = h . c = 0. Therefore

- the gradient through z, which is the same multiple of sum_p a_p r_p for every patch, is zero;
- the gradient through the factor 1 / (M - m) is zero for the same reason: the maximum has no gradient, and the minimum
  has one only where it is subtracted;
- kept_p is a step and has no gradient.

With k = 1 / (z (M - m)), what remains is

    g_p = k kept_p r_p, and at the arg-min its own g_p less k sum_q kept_q r_q.

It sums to zero over the patches: adding a constant to all similarities changes nothing. If several patches share the
minimum, each gets an equal part, as in PyTorch's `amin`. If all patches are equally similar, the weights are constant
and g = 0. For the softmax over patches, the same h . c = 0 gives g_p = a_p r_p.

**The gradient by the features.** For the tokens of one caption, stack the rows a over the rows g, and the rows h over
the rows t. Then grad v = [a; g]^T [h; t] is one matrix product, and grad t = g v + (the part of Eq. 6). With cosines
C = c^ t^^T, their gradient G, and ^ for unit vectors,

    h_j = (sum_k G_jk t^_k - c^_j sum_k G_jk C_jk) / |c_j|,

and the same for t. The projection that makes h . c zero costs a row sum of G * C. The gradient of a zero vector is
divided by sqrt(D), as in `functional`.

**What is kept for backward.** The loss needs two multiply-adds for every valid token, patch and dimension, and the
gradient four. Backward alone would have to compute similarities and groups again, which makes eight in total. So the
gradient of the unweighted loss is computed in forward, where patches, similarities and groups are available. It is
kept until backward multiplies it, in place, by the incoming gradient. It takes as much memory as the features, which
backward would need anyway; autograd saves only the inputs. With `recompute=True` nothing is kept, and backward
computes the gradient from the inputs. The same happens in float16, where a gradient would underflow before the loss
scaler is applied, and in a second backward through the same graph.

Similarities, minima, weights, groups, norms, logits and sums are float32 at least, whatever the autocast.
"""

import torch
from einops import rearrange
from torch import Tensor

from sparc_loss._arithmetic import autocast_disabled, full_precision_dtype
from sparc_loss.functional import Alignment, AlignmentSettings, Reduction
from sparc_loss.fused.alignment import unit_and_norm, usable_patches_of, weights_and_gradient
from sparc_loss.fused.function import Gradients, fused_loss
from sparc_loss.fused.groups import Group, Settings, groups_of


# A hand-written gradient cannot be traced: torch.compile breaks its graph here and continues after the call.
@torch.compiler.disable
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
    chunk_bytes: int | None = None,
    recompute: bool = False,
) -> Tensor:
    """`functional.fine_grained_loss` with first derivatives only.

    Under torch.compile it runs uncompiled between two graphs. `torch.func`, forward-mode differentiation and second
    derivatives need `functional`.

    The arguments are those of `functional.fine_grained_loss`, and two more. `chunk_bytes` bounds the workspace of one
    group of captions, or of one caption if that needs more. None is 8 MiB on a CPU, so that a group stays in the
    cache, and 2 GiB elsewhere, where few large groups launch fewer kernels. `recompute` keeps only the inputs
    between forward and backward, for a third more multiplications.

    Raises:
        TypeError, ValueError: as `functional.fine_grained_loss`; a chunk_bytes below 1.
        RuntimeError: in a transform of torch.func, in forward-mode differentiation, and in backward when a second
            derivative is requested.

    Example:
        >>> patches, tokens = torch.randn(2, 49, 16), torch.randn(2, 7, 16)
        >>> fine_grained_loss(patches, tokens, torch.ones(2, 7, dtype=torch.bool), logit_scale=10.0).shape
        torch.Size([])
    """
    settings = AlignmentSettings(threshold, alignment, reduction)
    features = patch_features, token_features, token_mask, logit_scale
    return fused_loss(_loss_and_gradients, *features, patch_mask, region_mask, settings, chunk_bytes, recompute)


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
) -> tuple[Tensor, Gradients]:
    """See `fused.function.LossAndGradients`."""
    device, dtype = patch_features.device, full_precision_dtype(patch_features, token_features)
    scale = logit_scale.detach().reshape(()).to(device, dtype)
    loss, grad_scale = torch.zeros_like(scale), torch.zeros_like(scale)
    grad_patches = torch.empty_like(patch_features, memory_format=torch.contiguous_format) if wanted[0] else None
    grad_tokens = torch.zeros_like(token_features, memory_format=torch.contiguous_format) if wanted[1] else None
    groups, empty = groups_of(valid_tokens, patch_features.shape, dtype.itemsize, settings)
    if grad_patches is not None:
        grad_patches.index_fill_(0, empty, 0)
    tokens_of_batch = valid_tokens.sum().clamp(min=1).to(dtype)

    with autocast_disabled(device):
        for group in groups:
            if settings.alignment.reduction == "token":
                share = (1 / tokens_of_batch).expand(len(group.captions))
            else:
                share = 1 / (group.numbers.clamp(min=1) * len(valid_tokens)).to(dtype)
            v = patch_features[group.captions].to(dtype)
            if patch_mask is not None:
                v.masked_fill_(~patch_mask[group.captions][..., None], 0)
            t = group.tokens(token_features, dtype)
            usable = usable_patches_of(group, group.captions, patch_mask, region_mask)
            group_loss, grad_v, grad_t, slope = _group_loss(
                v, t, scale, group, usable, share, settings, wanted, weight
            )
            loss += group_loss
            if grad_patches is not None and grad_v is not None:
                grad_patches.index_copy_(0, group.captions, grad_v.to(grad_patches.dtype))
            if grad_tokens is not None and grad_t is not None:
                grad_tokens[group.places] = grad_t.to(grad_tokens.dtype)
            if slope is not None:
                grad_scale += slope
            del v, t, usable, grad_v, grad_t  # before those of the next group

    grad_scale = grad_scale.to(logit_scale.device, logit_scale.dtype).reshape(logit_scale.shape)
    return loss, (grad_patches, grad_tokens, grad_scale if wanted[2] else None)


def _group_loss(
    v: Tensor,
    t: Tensor,
    scale: Tensor,
    group: Group,
    usable: Tensor | None,
    share: Tensor,
    settings: Settings,
    wanted: tuple[bool, bool, bool],
    weight: Tensor | float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The loss of one group, and `weight` times its gradient by v, t and the scale, in the letters of this file.

    v [G, P, D] patches; t [G, N, D] tokens, zero where not valid; usable [G, N, P]; share [G] of a token in the mean.
    """
    a, similarity_gradient = weights_and_gradient(torch.bmm(t, v.mT), usable, settings.alignment)
    c_unit, c_norm = unit_and_norm(torch.bmm(a, v))
    t_unit, t_norm = unit_and_norm(t)
    cosine = torch.bmm(c_unit, t_unit.mT)
    loss, grad_logits = _contrast(cosine * scale, group.valid, share)
    if not any(wanted):
        return loss, None, None, None

    want_v, want_t, want_scale = wanted
    grad_logits *= weight
    slope = grad_logits * cosine
    grad_scale = slope.sum() if want_scale else None
    if not (want_v or want_t):
        return loss, None, None, grad_scale

    grad_cosine = grad_logits.mul_(scale)
    slope *= scale
    # The projections, and the division by the norms, are applied on [N, N], before the product with D dimensions.
    h = torch.bmm(grad_cosine / c_norm, t_unit)
    h.addcmul_(c_unit, slope.sum(dim=-1, keepdim=True) / c_norm, value=-1)
    g = similarity_gradient(torch.bmm(h, v.mT))
    grad_v = torch.bmm(torch.cat([a, g], dim=1).mT, torch.cat([h, t], dim=1)) if want_v else None
    if not want_t:
        return loss, grad_v, None, grad_scale
    grad_t = torch.bmm((grad_cosine / t_norm.mT).mT, c_unit)
    grad_t.addcmul_(t_unit, rearrange(slope.sum(dim=-2), "b l -> b l 1") / t_norm, value=-1)
    return loss, grad_v, torch.baddbmm(grad_t, g, v), grad_scale


def _contrast(logits: Tensor, valid: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 6 summed over a group, caption b weighted by share[b], and its gradient by the logits [G, N, N]."""
    masked = ~(rearrange(valid, "b j -> b j 1") & rearrange(valid, "b k -> b 1 k"))
    logits = logits.masked_fill(masked, torch.finfo(logits.dtype).min)
    over_tokens, over_groups = logits.logsumexp(dim=-1, keepdim=True), logits.logsumexp(dim=-2, keepdim=True)
    match = torch.diagonal(logits, dim1=-2, dim2=-1)
    terms = (over_tokens.squeeze(-1) + over_groups.squeeze(-2)) / 2 - match
    loss = (terms.masked_fill_(~valid, 0) * rearrange(share, "b -> b 1")).sum()

    gradient = (logits - over_tokens).exp_().add_((logits - over_groups).exp_()).div_(2)
    torch.diagonal(gradient, dim1=-2, dim2=-1).sub_(1)
    return loss, gradient.mul_(rearrange(share, "b -> b 1 1")).masked_fill_(masked, 0)
