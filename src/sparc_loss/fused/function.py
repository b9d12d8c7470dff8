"""The `torch.autograd.Function` of the fused losses, and the checks before it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sparc_loss._arithmetic import full_precision_dtype
from sparc_loss._checks import check_features, check_scale
from sparc_loss._masks import valid_tokens
from sparc_loss.functional import AlignmentSettings
from sparc_loss.fused.groups import settings_for

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""By patch_features, token_features and logit_scale."""

LossAndGradients = Callable[..., tuple[Tensor, Gradients]]
"""(patch_features, token_features, logit_scale, valid_tokens, patch_mask, region_mask, settings, wanted, weight=1) ->
the loss, and `weight` times each of its gradients that is `wanted`."""

_TAKE_EAGER = 'take implementation="eager" (sparc_loss.functional), which is differentiable to any order'


def fused_loss(
    loss_and_gradients: LossAndGradients,
    patch_features: Tensor,
    token_features: Tensor,
    token_mask: Tensor,
    logit_scale: Tensor | float,
    patch_mask: Tensor | None,
    region_mask: Tensor | None,
    alignment: AlignmentSettings,
    chunk_bytes: int | None,
    recompute: bool,
) -> Tensor:
    """Check the arguments and compute the loss; see `fused.fine_grained_loss` for the arguments and the errors."""
    check_features("b p d, b l d", patch_features=patch_features, token_features=token_features)
    masks = valid_tokens(token_features, patch_features, token_mask, patch_mask, region_mask), patch_mask, region_mask
    check_scale(logit_scale)
    if not isinstance(logit_scale, Tensor):
        # Filled there, not copied to there, for which the host would wait.
        dtype = full_precision_dtype(patch_features, token_features)
        logit_scale = torch.full((), logit_scale, dtype=dtype, device=patch_features.device)
    settings = settings_for(patch_features.device, alignment, chunk_bytes, recompute)
    features = patch_features, token_features, logit_scale
    if is_transformed(*features):
        raise RuntimeError(
            f"the fused loss supports neither torch.func nor forward-mode differentiation; {_TAKE_EAGER}"
        )
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in features):
        loss: Tensor = _FusedLoss.apply(*features, *masks, settings, loss_and_gradients)
        return loss
    with torch.no_grad():
        return loss_and_gradients(*features, *masks, settings, (False, False, False))[0]


def is_transformed(*tensors: Tensor) -> bool:
    """Whether torch.func transforms these tensors, or forward-mode differentiation tracks one of them."""
    if torch._C._are_functorch_transforms_active():  # what torch.autograd.Function itself asks
        return True
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


class _FusedLoss(torch.autograd.Function):
    """(the first seven arguments of `LossAndGradients`, and that function) -> loss."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, settings, loss_and_gradients = inputs
        ctx.settings, ctx.loss_and_gradients = settings, loss_and_gradients
        ctx.save_for_backward(*tensors)
        wanted = tuple(ctx.needs_input_grad[:3])
        # In float16, a gradient would underflow before the loss scaler is applied.
        if settings.recompute or any(
            tensor.dtype == torch.float16 for tensor, want in zip(tensors, wanted, strict=False) if want
        ):
            ctx.gradients = None
            loss, _ = loss_and_gradients(*tensors, settings, (False, False, False))
        else:
            loss, ctx.gradients = loss_and_gradients(*tensors, settings, wanted)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        if torch._C._functorch.is_legacy_batchedtensor(grad_output):  # is_grads_batched=True
            raise RuntimeError(f"the fused loss does not take several gradients at once; {_TAKE_EAGER}")
        # Released, because the receiver may change them: a second backward through this graph computes its own.
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
                gradient if gradient is None else _OnceDifferentiable.apply(gradient, *inputs)
                for gradient in gradients
            )
        return *gradients, None, None, None, None, None


class _OnceDifferentiable(torch.autograd.Function):
    """A gradient as a function of the inputs that it was computed from; differentiating it again is an error."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(f"the fused losses have no second derivative; {_TAKE_EAGER}")
