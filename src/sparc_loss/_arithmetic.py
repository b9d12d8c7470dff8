"""Arithmetic in float32 at least, whatever the autocast; float64 stays float64."""

from contextlib import AbstractContextManager, nullcontext

import torch
from einops import einsum
from torch import Tensor


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def full_precision_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 if one of the tensors is."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def product(left: Tensor, right: Tensor, pattern: str) -> Tensor:
    """`einops.einsum` of two tensors in full precision."""
    dtype = full_precision_dtype(left, right)
    with autocast_disabled(left.device):
        return einsum(left.to(dtype), right.to(dtype), pattern)


def l2_normalised(features: Tensor) -> Tensor:
    """Unit vectors along the last axis; a zero vector stays zero, and no eps hides the gradient of tiny ones."""
    features = full_precision(features)
    # With a largest component of 1, squares neither overflow nor vanish; the unit vector is the same at any scale.
    largest = features.detach().abs().amax(dim=-1, keepdim=True)
    is_zero = largest == 0
    features = features / largest.masked_fill(is_zero, 1)
    # The norm of a zero vector has no second derivative, so a zero vector is divided by another norm.
    return features / torch.linalg.vector_norm(features.masked_fill(is_zero, 1), dim=-1, keepdim=True)


def autocast_disabled(device: torch.device) -> AbstractContextManager[None]:
    """A context without autocast; some devices, such as meta, have none."""
    # Not every torch can trace the question.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()
