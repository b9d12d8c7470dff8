"""Batches over several ranks: what their losses share."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def gathered(tensor: Tensor, world_size: int) -> Tensor:
    """The tensors [B, ...] of all ranks in their order, [W * B, ...]. Gradients are summed over ranks."""
    if world_size == 1:
        return tensor
    if tensor.dtype == torch.bool:
        return gathered(tensor.byte(), world_size).bool()
    everywhere: Tensor = _Gathered.apply(tensor, world_size)
    return everywhere


def padded_to_longest(token_features: Tensor, token_mask: Tensor, world_size: int) -> tuple[Tensor, Tensor]:
    """Tokens [B, L, D] and mask [B, L], padded with masked zeros to the longest L of all ranks."""
    if world_size == 1:
        return token_features, token_mask
    length = token_mask.shape[1]
    longest = torch.tensor(length, device=token_mask.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    missing = int(longest.item()) - length
    return F.pad(token_features, (0, 0, 0, missing)), F.pad(token_mask, (0, missing))


def mean_over_ranks(mean_here: Tensor, number_here: Tensor, world_size: int) -> Tensor:
    """A mean over `number_here` items as this rank's share of the mean over the items of all ranks.

    It is divided by the mean number per rank, so that the mean of all ranks' shares is the mean over all items.
    """
    if world_size == 1:
        return mean_here
    everywhere = number_here.clone()
    dist.all_reduce(everywhere)
    return mean_here * number_here * world_size / everywhere.clamp(min=1)


class _Gathered(torch.autograd.Function):
    """all_gather with gradient; torch.distributed.nn's is deprecated, and not every torch has its successors."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, world_size: int) -> Tensor:
        ctx.pairs = len(tensor)
        everywhere = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size)]
        dist.all_gather(everywhere, tensor.contiguous())
        return torch.cat(everywhere)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Not reduce_scatter, which some builds of gloo lack.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[dist.get_rank() * ctx.pairs :][: ctx.pairs], None
