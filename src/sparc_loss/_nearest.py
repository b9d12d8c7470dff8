"""Which candidate is nearest; a tie never counts in favour of a row's own."""

import torch
from torch import Tensor

# Two cosines closer than this tie: float32 rounding may put equal ones in either order.
TIE = 1e-6


def own_is_nearest(cosine: Tensor, valid: Tensor) -> Tensor:
    """Whether row i's nearest column is column i, and no other is as near: bool [B, L].

    Args:
        cosine: [B, L, L]; entries of masked rows and columns may be anything.
        valid: bool [B, L], the rows and columns that take part; masked rows may be True or False in the result.
    """
    as_near = cosine >= torch.diagonal(cosine, dim1=-2, dim2=-1).unsqueeze(-1) - TIE
    return (as_near & valid.unsqueeze(-2)).sum(dim=-1) == 1
