"""The implementations of the fine-grained loss and of the contrast with other images; each holds every property."""

from collections.abc import Callable

from torch import Tensor

from sparc_loss import functional, fused

IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "eager": functional.fine_grained_loss,
    "fused": fused.fine_grained_loss,
}
IMAGE_CONTRASTS: dict[str, Callable[..., Tensor]] = {
    "eager": functional.image_contrastive_loss,
    "fused": fused.image_contrastive_loss,
}
