"""The cross-entropies of the contrast with other images, and their gradients: small, and made in whole batches."""

import torch
from torch import Tensor

from sparc_loss.functional import Direction, Reduction, places_by_image


def share_of_caption(captions: Tensor, reduction: Reduction, dtype: torch.dtype) -> Tensor | float:
    """The share of each caption in the mean; `captions` [B] is False for those without a valid token."""
    if reduction == "token":
        return 1 / captions.sum().clamp(min=1).to(dtype)
    return 1 / max(len(captions), 1)


def contrast(
    scores: Tensor,
    scale: Tensor,
    captions: Tensor,
    without_patch: Tensor | None,
    direction: Direction,
    share: Tensor | float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of scores, its gradient by them, and by the scale; see `functional.image_contrastive_loss`.

    Args:
        scores: [G, 1 + K] of captions on images; of the whole batch for "both" directions.
        scale: scalar, 1/tau.
        captions: bool [G], False for captions without a valid token.
        without_patch: bool [G, 1 + K], True for images without a valid patch; None is none.
        direction: "text_to_image" or "both".
        share: of a caption in the mean.
    """
    logits = scores * scale
    if without_patch is not None:
        logits.masked_fill_(without_patch, torch.finfo(logits.dtype).min)
    loss, gradient = _cross_entropy(logits, captions)
    if direction == "both":
        rows, columns = places_by_image(logits)
        by_image = logits[rows, columns].masked_fill_(~captions[rows], torch.finfo(logits.dtype).min)
        of_images, by_images = _cross_entropy(by_image, captions)
        loss = (loss + of_images) / 2
        gradient[rows, columns] += by_images
        gradient /= 2
    gradient *= share
    return loss.sum() * share, gradient * scale, (gradient * scores).sum()


def _cross_entropy(logits: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
    """Per row, with column 0 as target, and its gradient; 0 where there is no caption."""
    log_sum = logits.logsumexp(dim=1)
    gradient = (logits - log_sum[:, None]).exp_()
    gradient[:, 0] -= 1
    return (log_sum - logits[:, 0]).where(captions, 0), gradient.masked_fill_(~captions[:, None], 0)
