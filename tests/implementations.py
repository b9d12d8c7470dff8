"""The implementations of the fine-grained loss, each of which holds every property."""

from collections.abc import Callable

from torch import Tensor

from sparc_loss import functional, fused

IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "eager": functional.fine_grained_loss,
    "fused": fused.fine_grained_loss,
}
