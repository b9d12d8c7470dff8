"""The fine-grained loss for little more than its matrix products: the value and the gradient of `functional`, cheaper.

`functional.py` is the truth, this file a faster way to it. Where they differ, this file is wrong.

**What makes it cheap.** Captions are short and the text context is long: of 77 positions some 16 hold words, but some
caption of every batch is nearly full, so that cutting the batch to its longest caption gains nothing. Here every
caption gives up its masked tokens (holes are fine), captions of about the same length stand together, and such groups
are worked through one after the other in a workspace of `chunk_bytes`. A hand-written gradient keeps nothing of what
lies in that workspace, and a group's patches are still in the processor's cache when they are needed again.

**What cancels.** For one token, with s_p its similarities, m and M their minimum and maximum over the n patches it may
use, kept_p the test of Eq. 3 and u_p = kept_p (s_p - m) / (M - m), Eqs. 2 to 5 read

    a_p = u_p / z,  z = sum_p u_p,  c = sum_p a_p v_p,

and Eq. 6 sees c through its direction only. Let h be the gradient of the loss by c. Scaling c changes nothing, so
h . c = 0. With it, writing r_p = h . v_p for the gradient by a_p, sum_p a_p r_p = h . c = 0, and therefore

- the gradient through z, which is the same multiple of sum_p a_p r_p for every patch, is zero;
- so is the gradient through the factor 1 / (M - m), for the same reason: the maximum has no gradient at all, and the
  minimum has one only where it is subtracted;
- kept_p is a step and has none.

What is left, with k = 1 / (z (M - m)), is

    g_p = k kept_p r_p,  and the arg-min's own g_p less k sum_q kept_q r_q,

which sums to zero over the patches: adding a constant to all similarities changes nothing. If several patches share
the minimum, each takes an equal part, as PyTorch's `amin` has it. A token to which all patches are equally similar has
constant weights, hence g = 0. For the softmax over patches the same h . c = 0 leaves g_p = a_p r_p.

**The gradient by the features.** Stack, for the tokens of one caption, the rows a over the rows g, and the rows h over
the rows t:  grad v = [a; g]^T [h; t]  is one matrix product with one write, and  grad t = g v + (Eq. 6's own part).
With cosines C = c^ t^^T, G the gradient by them and ^ for unit vectors,

    h_j = (sum_k G_jk t^_k - c^_j sum_k G_jk C_jk) / |c_j|,

and likewise for t: the projection that makes h . c zero costs a row sum of G * C. A zero vector divides by sqrt(D),
as in `functional`.

**What is kept for backward.** These are six multiply-adds for every valid token, patch and dimension: two for the
value, four for the gradient. Backward alone would have to compute similarities and groups again, which makes eight. So
the gradient of the unweighted loss is computed in forward, where patches, similarities and groups are at hand, and
held until backward multiplies it, in place, by what comes in. It takes as much memory as the features, which is what
backward would need a moment later; autograd saves the inputs and nothing else. `recompute=True` holds nothing and
computes the gradient in backward, from the inputs alone. So does float16, whose gradient would vanish before the loss
scaler had its say, and so does a second backward through the same graph.

Similarities, minima, weights, groups, norms, logits and sums are float32 at least, whatever the autocast.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd import forward_ad

from sparc_loss._validation import check_choice, check_features, check_number, check_scale
from sparc_loss.functional import (
    ALIGNMENTS,
    REDUCTIONS,
    Alignment,
    Reduction,
    autocast_disabled,
    countable_tokens,
)

# A processor's cache decides: with 8 MiB, 2 threads are 2 to 4 times faster than with 1 MiB, and as fast as with 32.
CPU_CHUNK_BYTES = 8 * 2**20
# On a GPU every group costs some forty kernel launches: on an H100, a quarter of the groups takes 60 % of the time.
OTHER_CHUNK_BYTES = 512 * 2**20
# A group may hold so many masked positions for every one that counts: products spent for fewer groups.
CPU_PADDING, OTHER_PADDING = 0.1, 1.0

_TAKE_EAGER = 'take implementation="eager" (sparc_loss.functional), which is differentiable to any order'

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


# A hand-written gradient cannot be traced: a compiled caller breaks its graph here, and goes on after it.
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
    """`functional.fine_grained_loss`, with first derivatives only.

    Under torch.compile it runs as it is, between two graphs. `torch.func`, forward-mode and second derivatives need
    `functional`. On a GPU the host waits once for the numbers of tokens, by which the captions are grouped.

    Args:
        patch_features: [B, P, D], not normalised.
        token_features: [B, L, D], not normalised.
        token_mask: bool [B, L], True for the tokens that count.
        logit_scale: 1/tau, a number or a tensor of one element.
        threshold: sigma of Eq. 3, in [0, 1]; None is 1/P.
        alignment: "sparse", "dense" or "softmax", see `functional.alignment_weights`.
        reduction: "token" or "sample", see `functional.sequence_contrastive_loss`.
        patch_mask: bool [B, P], False for padding patches.
        region_mask: bool [B, L, P], True for the patches a token may use; a token that may use none does not count.
        chunk_bytes: bound in bytes of the workspace of one group of captions, or one caption if that needs more. None
            is 8 MiB on a CPU, where a group should stay in the cache, and 512 MiB elsewhere, where few large groups
            launch fewer kernels.
        recompute: hold nothing but the inputs between forward and backward, for a third more multiplications.

    Returns:
        Scalar, float32 (float64 if a feature is).

    Raises:
        TypeError: features not floating point, a mask not bool, a threshold that is no number.
        ValueError: wrong shapes or devices, a threshold outside [0, 1], an unknown alignment or reduction, a
            chunk_bytes below 1.
        RuntimeError: in a transform of torch.func, in forward-mode differentiation, and in backward when a second
            derivative is asked for.

    Example:
        >>> patches, tokens = torch.randn(2, 49, 16), torch.randn(2, 7, 16)
        >>> fine_grained_loss(patches, tokens, torch.ones(2, 7, dtype=torch.bool), logit_scale=10.0).shape
        torch.Size([])
    """
    return _checked_and_applied(
        _loss_and_gradients,
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


def _checked_and_applied(
    loss_and_gradients: Callable[..., tuple[Tensor, Gradients]],
    patch_features: Tensor,
    token_features: Tensor,
    token_mask: Tensor,
    logit_scale: Tensor | float,
    threshold: float | None,
    alignment: Alignment,
    reduction: Reduction,
    patch_mask: Tensor | None,
    region_mask: Tensor | None,
    chunk_bytes: int | None,
    recompute: bool,
) -> Tensor:
    """The loss of arguments that this checks, by a function called like `_loss_and_gradients`."""
    check_features("b p d, b l d", patch_features=patch_features, token_features=token_features)
    check_choice("alignment", alignment, ALIGNMENTS)
    check_choice("reduction", reduction, REDUCTIONS)
    if threshold is not None:
        check_number("threshold", threshold, 0, 1)
    if patch_features.shape[1] == 0:
        raise ValueError(f"patch_features has shape {list(patch_features.shape)}; expected at least one patch")
    countable = countable_tokens(token_features, patch_features, token_mask, patch_mask, region_mask)
    dtype = torch.promote_types(torch.promote_types(patch_features.dtype, token_features.dtype), torch.float32)
    check_scale(logit_scale)
    logit_scale = torch.as_tensor(logit_scale, dtype=None if isinstance(logit_scale, Tensor) else dtype)
    on_cpu = patch_features.device.type == "cpu"
    if chunk_bytes is None:
        chunk_bytes = CPU_CHUNK_BYTES if on_cpu else OTHER_CHUNK_BYTES
    check_number("chunk_bytes", chunk_bytes, 1)

    if is_transformed(patch_features, token_features, logit_scale):
        raise RuntimeError(
            f"the fused loss works neither in torch.func nor in forward-mode differentiation; {_TAKE_EAGER}"
        )
    settings = _Settings(
        threshold, alignment, reduction, chunk_bytes, CPU_PADDING if on_cpu else OTHER_PADDING, recompute
    )
    features = patch_features, token_features, logit_scale
    masks = countable, patch_mask, region_mask
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in features):
        return _FineGrainedLoss.apply(*features, *masks, settings, loss_and_gradients)
    with torch.no_grad():
        return loss_and_gradients(*features, *masks, settings, (False, False, False))[0]


def is_transformed(*tensors: Tensor) -> bool:
    """Whether torch.func transforms these, or forward-mode differentiation follows one of them."""
    if torch._C._are_functorch_transforms_active():  # what torch.autograd.Function itself asks
        return True
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


@dataclass(frozen=True)
class _Settings:
    threshold: float | None
    alignment: Alignment
    reduction: Reduction
    chunk_bytes: int
    padding: float
    recompute: bool


class _FineGrainedLoss(torch.autograd.Function):
    """(the first seven arguments of loss_and_gradients, and that function) -> loss."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, settings, loss_and_gradients = inputs
        ctx.settings, ctx.loss_and_gradients = settings, loss_and_gradients
        ctx.save_for_backward(*tensors)
        wanted = tuple(ctx.needs_input_grad[:3])
        # float16 has no room for a gradient that the loss scaler has not yet multiplied.
        if settings.recompute or any(
            tensor.dtype == torch.float16 for tensor, want in zip(tensors, wanted, strict=False) if want
        ):
            ctx.gradients = None
            return loss_and_gradients(*tensors, settings, (False, False, False))[0]
        loss, ctx.gradients = loss_and_gradients(*tensors, settings, wanted)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # Given away, for the receiver may change them: a second backward through the same graph computes its own.
        gradients, ctx.gradients = ctx.gradients, None
        with torch.no_grad():
            if gradients is None:
                wanted = tuple(ctx.needs_input_grad[:3])
                _, gradients = ctx.loss_and_gradients(*ctx.saved_tensors, ctx.settings, wanted, grad_output)
            elif grad_output.device.type != "cpu" or grad_output != 1:
                for gradient in gradients:
                    if gradient is not None:
                        gradient.mul_(grad_output)
        if torch.is_grad_enabled():  # create_graph=True
            inputs = (grad_output, *ctx.saved_tensors[:3])
            gradients = tuple(
                gradient if gradient is None else _Final.apply(gradient, *inputs) for gradient in gradients
            )
        return *gradients, None, None, None, None, None


class _Final(torch.autograd.Function):
    """A gradient as a function of what it was computed from, of which there is no derivative."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(f"the fused fine-grained loss has no second derivative; {_TAKE_EAGER}")


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
) -> tuple[Tensor, Gradients]:
    """The loss, and `weight` times its gradient by patch_features, token_features and logit_scale where wanted."""
    (batch, patches, dim), device = patch_features.shape, patch_features.device
    dtype = torch.promote_types(torch.promote_types(patch_features.dtype, token_features.dtype), torch.float32)
    scale = logit_scale.detach().reshape(()).to(device, dtype)
    loss, grad_scale = torch.zeros_like(scale), torch.zeros_like(scale)
    grad_patches = torch.empty_like(patch_features, memory_format=torch.contiguous_format) if wanted[0] else None
    grad_tokens = torch.zeros_like(token_features, memory_format=torch.contiguous_format) if wanted[1] else None

    # Captions by their number of tokens; in every caption the positions that count, in their order, then the others.
    numbers, captions = countable.sum(dim=1).sort()
    positions = countable.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    if settings.reduction == "token":
        shares = (1 / numbers.sum().clamp(min=1).to(dtype)).expand(batch)
    else:
        shares = 1 / (numbers.clamp(min=1) * batch).to(dtype)

    groups = list(_groups(numbers.tolist(), patches, dim, dtype.itemsize, settings))
    empty = groups[-1][0].start if groups else batch
    if grad_patches is not None:
        grad_patches.index_fill_(0, captions[:empty], 0)

    with autocast_disabled(device):
        for group, longest in groups:
            chosen, share = captions[group], shares[group]
            places = chosen[:, None], positions[chosen, :longest]
            counts = torch.arange(longest, device=device) < numbers[group, None]
            v = patch_features[chosen].to(dtype)
            if patch_mask is not None:
                v.masked_fill_(~patch_mask[chosen][..., None], 0)
            t = token_features[places].to(dtype).masked_fill_(~counts[..., None], 0)
            usable = _usable(places, counts, patch_mask, region_mask)

            group_loss, grad_v, grad_t, slope = _group_loss(
                v, t, scale, counts, usable, share, settings, wanted, weight
            )
            loss += group_loss
            if grad_v is not None:
                grad_patches.index_copy_(0, chosen, grad_v.to(grad_patches.dtype))
            if grad_t is not None:
                grad_tokens[places] = grad_t.to(grad_tokens.dtype)
            if slope is not None:
                grad_scale += slope
            del v, t, usable, grad_v, grad_t  # before the next group's

    grad_scale = grad_scale.to(logit_scale.device, logit_scale.dtype).reshape(logit_scale.shape)
    return loss, (grad_patches, grad_tokens, grad_scale if wanted[2] else None)


def _groups(
    numbers: list[int], patches: int, dim: int, itemsize: int, settings: _Settings, images: int = 1
) -> Iterator[tuple[slice, int]]:
    """Slices of captions, sorted by their number of tokens, and the longest of each; empty captions are in none."""
    stop = len(numbers)
    while stop and numbers[stop - 1]:
        longest = tokens = numbers[stop - 1]
        start = stop - 1
        # Patches and their gradient, twelve [L, D], six [L, P] and eight [L, L] at the fullest moment.
        per_token = 12 * dim + 6 * patches + 8 * longest
        # And two [L, D] and two [L, P] that wait for each further image of a caption: see fused_contrast.py.
        per_token += (images - 1) * 2 * (dim + patches)
        per_caption = itemsize * (2 * patches * dim + longest * per_token)
        while start and numbers[start - 1]:
            tokens += numbers[start - 1]
            size = stop - start + 1
            if size * per_caption > settings.chunk_bytes or size * longest > (1 + settings.padding) * tokens:
                break
            start -= 1
        yield slice(start, stop), longest
        stop = start


def _group_loss(
    v: Tensor,
    t: Tensor,
    scale: Tensor,
    counts: Tensor,
    usable: Tensor | None,
    share: Tensor,
    settings: _Settings,
    wanted: tuple[bool, bool, bool],
    weight: Tensor | float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """One group's part of the loss, and `weight` times its gradient by v, t and the scale, in the letters of the top.

    v [B, P, D] patches; t [B, L, D] tokens, zero where not counts [B, L]; usable [B, L, P]; share [B] of a token.
    """
    a, similarity_gradient = _weights(torch.bmm(t, v.mT), usable, settings)
    c_unit, c_norm = _unit(torch.bmm(a, v))
    t_unit, t_norm = _unit(t)
    cosine = torch.bmm(c_unit, t_unit.mT)
    loss, grad_logits = _contrast(cosine * scale, counts, share)
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
    # The projection off c and off t, and the division by their norms, on [L, L] before it meets D.
    h = torch.bmm(grad_cosine / c_norm, t_unit)
    h.addcmul_(c_unit, slope.sum(dim=-1, keepdim=True) / c_norm, value=-1)
    g = similarity_gradient(torch.bmm(h, v.mT))
    grad_v = torch.bmm(torch.cat([a, g], dim=1).mT, torch.cat([h, t], dim=1)) if want_v else None
    if not want_t:
        return loss, grad_v, None, grad_scale
    grad_t = torch.bmm((grad_cosine / t_norm.mT).mT, c_unit)
    grad_t.addcmul_(t_unit, rearrange(slope.sum(dim=-2), "b l -> b l 1") / t_norm, value=-1)
    return loss, grad_v, torch.baddbmm(grad_t, g, v), grad_scale


def _usable(
    places: tuple[Tensor, Tensor], counts: Tensor, patch_mask: Tensor | None, region_mask: Tensor | None
) -> Tensor | None:
    """The patches that each token of a group may use, bool broadcastable to [B, L, P]; None is all of them."""
    if patch_mask is None and region_mask is None:
        return None
    usable = torch.ones_like(counts[..., None]) if region_mask is None else region_mask[places]
    if patch_mask is not None:
        usable = usable & patch_mask[places[0]]
    # What stands in the place of a token gets a row that no 0/0 makes NaN.
    return usable | ~counts[..., None]


def _weights(similarity: Tensor, usable: Tensor | None, settings: _Settings) -> tuple[Tensor, Callable]:
    """Eqs. 2 to 4, and the function that takes the gradient by the weights to that by the similarities.

    Both work in the memory of their argument. The second supposes that the groups are normalised next: see the top.
    """
    if settings.alignment == "softmax":
        if usable is not None:
            similarity.masked_fill_(~usable, -torch.inf)
        weights = similarity.softmax(dim=-1)

        def softmax_gradient(gradient: Tensor) -> Tensor:
            # h . c is zero but for rounding, which peaked weights magnify: nearly equal numbers are subtracted.
            gradient -= (gradient * weights).sum(dim=-1, keepdim=True)
            return gradient.mul_(weights)

        return weights, softmax_gradient

    if usable is None:
        lowest, highest = torch.aminmax(similarity, dim=-1, keepdim=True)
        number = torch.full_like(lowest[0, 0], similarity.shape[-1])
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


def _unit(features: Tensor) -> tuple[Tensor, Tensor]:
    """`functional`'s unit vectors, and the norms [..., 1] by which their gradient is divided."""
    largest = torch.linalg.vector_norm(features, torch.inf, dim=-1, keepdim=True)
    is_zero = largest == 0
    largest.masked_fill_(is_zero, 1)
    unit = features / largest
    norm = torch.linalg.vector_norm(unit, dim=-1, keepdim=True).masked_fill_(is_zero, features.shape[-1] ** 0.5)
    return unit.div_(norm), largest.mul_(norm)


def _contrast(logits: Tensor, counts: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 6 summed over a group, caption b weighted by share[b], and its gradient by the logits [B, L, L]."""
    neither = ~(rearrange(counts, "b j -> b j 1") & rearrange(counts, "b k -> b 1 k"))
    logits = logits.masked_fill(neither, torch.finfo(logits.dtype).min)
    over_tokens, over_groups = logits.logsumexp(dim=-1, keepdim=True), logits.logsumexp(dim=-2, keepdim=True)
    match = torch.diagonal(logits, dim1=-2, dim2=-1)
    terms = (over_tokens.squeeze(-1) + over_groups.squeeze(-2)) / 2 - match
    loss = (terms.masked_fill_(~counts, 0) * rearrange(share, "b -> b 1")).sum()

    gradient = (logits - over_tokens).exp_().add_((logits - over_groups).exp_()).div_(2)
    torch.diagonal(gradient, dim1=-2, dim2=-1).sub_(1)
    return loss, gradient.mul_(rearrange(share, "b -> b 1 1")).masked_fill_(neither, 0)
