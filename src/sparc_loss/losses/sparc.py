"""SPARC: open_clip's global loss plus the fine-grained loss within each pair (arXiv 2401.09865, Eq. 7).

With `image_negatives`, which the paper does not have, a contrast of each pair's alignment with other images as well.
"""

import logging

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparc_loss import functional, fused, fused_contrast
from sparc_loss._validation import check_choice, check_number, check_whole_number
from sparc_loss.functional import (
    ALIGNMENTS,
    REDUCTIONS,
    Alignment,
    Reduction,
    countable_tokens,
)
from sparc_loss.losses.objective import Objective
from sparc_loss.metrics import alignment_metrics

IMPLEMENTATIONS = ("auto", "eager", "fused")

logger = logging.getLogger(__name__)


class SparcLoss(Objective):
    """lambda_g L_g + lambda_f L_f (Eq. 7), with open_clip's ClipLoss as L_g and its constructor arguments.

    Over W ranks the gradient that DistributedDataParallel averages equals that of one process on the whole batch.
    The fine-grained half gathers nothing; with `reduction="token"` it all-reduces one integer.

    `image_negatives` adds `image_contrastive_weight` times `functional.image_contrastive_loss`. Its negatives are
    images of the rank's own batch: over W ranks it is the mean over the captions of all, each contrasted with other
    images of its rank. It gathers nothing either, and all-reduces one integer of its own.

    Args:
        global_weight: lambda_g; scales the `contrastive_loss` of the global loss. 0 skips that half's work.
        fine_grained_weight: lambda_f. 0 skips that half's work.
        threshold: sigma of Eq. 3 in [0, 1]; None is the paper's 1/P.
        alignment: "sparse" (the paper), "dense" (no Eq. 3) or "softmax" (over patches, instead of Eqs. 2-4).
        reduction: "token" (the paper's Listing 1) or "sample" (its Eq. 6).
        fine_grained_scale: 1/tau of the fine-grained half; None shares the model's learned `logit_scale` (the paper).
        image_negatives: K, the number of other images with which each caption's alignment is contrasted; costs 1 + K
            alignments. A batch with fewer other images uses those it has. 0 is the paper.
        image_contrastive_weight: of that contrast. 0 skips its work. Its settings are those of the fine-grained half.
        implementation: "eager" takes the plain functions of `sparc_loss.functional`, differentiable to any order and
            compiled without a graph break; "fused" takes `sparc_loss.fused`, cheaper, with first derivatives only and
            a graph break under torch.compile. "auto" takes "fused" on the CPU, and on CUDA for the contrast with
            other images, whose plain form needs much memory. It takes "eager" for the fine-grained loss on CUDA,
            because the host waits in the fused one: beside a ViT-B/16 step of 256 pairs on an H100, eager adds 3.4 %
            of time and fused 10 %. It also takes "eager" on other devices, in torch.compile, torch.func and
            forward-mode differentiation. It logs each choice once, at debug level.
        global_loss: a module called like open_clip's losses and returning a dict with `contrastive_loss`, such as
            SigLipLoss or CoCaLoss; its other terms pass through unweighted. None makes a ClipLoss.
        local_loss, gather_with_grad, cache_labels, rank, world_size: as in open_clip's ClipLoss.
        metrics: with `output_dict=True`, also return the numbers of `sparc_loss.metrics.alignment_metrics`, which are
            no terms of the loss and have no gradient: for a loop that sums only the keys ending in `_loss`, as that of
            open_clip 4, and logs the others.

    Raises:
        TypeError: a weight, threshold or scale that is no number, a K that is not whole.
        ValueError: a negative weight or K, a threshold outside [0, 1], a scale not above 0, an unknown `alignment`,
            `reduction` or `implementation`; `world_size > 1` without `gather_with_grad=True`, or a `global_loss`
            of another world_size.
        ImportError: `global_loss` is None and open_clip is not installed.

    Example:
        >>> loss = SparcLoss()
        >>> total = loss(**model(images, texts))                     # doctest: +SKIP
        >>> parts = loss(**model(images, texts), output_dict=True)   # doctest: +SKIP
    """

    settings = (
        "global_weight",
        "fine_grained_weight",
        "threshold",
        "alignment",
        "reduction",
        "fine_grained_scale",
        "image_negatives",
        "image_contrastive_weight",
    )

    def __init__(
        self,
        global_weight: float = 0.5,
        fine_grained_weight: float = 1.0,
        threshold: float | None = None,
        alignment: Alignment = "sparse",
        reduction: Reduction = "token",
        fine_grained_scale: float | None = None,
        image_negatives: int = 0,
        image_contrastive_weight: float = 1.0,
        implementation: str = "auto",
        global_loss: nn.Module | None = None,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        metrics: bool = False,
    ) -> None:
        super().__init__(
            global_weight=global_weight,
            fine_grained_weight=fine_grained_weight,
            fine_grained_scale=fine_grained_scale,
            global_loss=global_loss,
            local_loss=local_loss,
            gather_with_grad=gather_with_grad,
            cache_labels=cache_labels,
            rank=rank,
            world_size=world_size,
        )
        if threshold is not None:
            check_number("threshold", threshold, 0, 1)
        check_choice("alignment", alignment, ALIGNMENTS)
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("implementation", implementation, IMPLEMENTATIONS)
        check_whole_number("image_negatives", image_negatives, 0)
        check_number("image_contrastive_weight", image_contrastive_weight, 0)

        self.threshold = threshold
        self.alignment = alignment
        self.reduction = reduction
        self.image_negatives = image_negatives
        self.image_contrastive_weight = image_contrastive_weight
        self.implementation = implementation
        self.metrics = metrics
        self._logged: set[str] = set()

    def fine_grained_term(
        self,
        *,
        logit_scale: Tensor | float,
        patch_features: Tensor,
        token_features: Tensor,
        token_mask: Tensor,
        patch_mask: Tensor | None,
        region_mask: Tensor | None,
        **_: Tensor,
    ) -> Tensor:
        """L_f of this rank's captions, so scaled that the mean over ranks is L_f of the whole batch."""
        module = fused if self._fuses(("cpu",), patch_features, token_features, logit_scale) else functional
        loss = module.fine_grained_loss(
            patch_features,
            token_features,
            token_mask,
            logit_scale,
            threshold=self.threshold,
            alignment=self.alignment,
            reduction=self.reduction,
            patch_mask=patch_mask,
            region_mask=region_mask,
        )
        if self.reduction == "token" and self.world_size > 1:
            countable = countable_tokens(token_features, patch_features, token_mask, patch_mask, region_mask)
            loss = _mean_over_all(loss, countable.sum(), self.world_size)
        return loss

    def further_terms(
        self,
        *,
        logit_scale: Tensor | float,
        patch_features: Tensor,
        token_features: Tensor,
        token_mask: Tensor,
        patch_mask: Tensor | None,
        region_mask: Tensor | None,
        **_: Tensor,
    ) -> dict[str, Tensor]:
        """{"image_contrastive_loss": ...}, weighted and scaled as the fine-grained term, if there are negatives."""
        if self.image_negatives == 0 or self.image_contrastive_weight == 0:
            return {}
        devices = ("cpu", "cuda")
        module = fused_contrast if self._fuses(devices, patch_features, token_features, logit_scale) else functional
        loss = module.image_contrastive_loss(
            patch_features,
            token_features,
            token_mask,
            logit_scale,
            self.image_negatives,
            threshold=self.threshold,
            alignment=self.alignment,
            reduction=self.reduction,
            patch_mask=patch_mask,
            region_mask=region_mask,
        )
        if self.reduction == "token" and self.world_size > 1:
            countable = countable_tokens(token_features, patch_features, token_mask, patch_mask, region_mask)
            loss = _mean_over_all(loss, countable.any(dim=1).sum(), self.world_size)
        return {"image_contrastive_loss": self.image_contrastive_weight * loss}

    def metrics_of(self, **local_outputs: Tensor | None) -> dict[str, Tensor]:
        """The numbers of `alignment_metrics` where the constructor was asked for them."""
        if not self.metrics:
            return {}
        return alignment_metrics(**local_outputs, threshold=self.threshold, alignment=self.alignment)

    def _fuses(
        self, devices: tuple[str, ...], patch_features: Tensor, token_features: Tensor, logit_scale: Tensor | float
    ) -> bool:
        """Whether to take the fused form, which is the better one on these kinds of devices."""
        if self.implementation != "auto":
            return self.implementation == "fused"
        if torch.compiler.is_compiling():
            _log_choice("eager", "inside torch.compile")
            return False
        features = [each for each in (patch_features, token_features, logit_scale) if isinstance(each, Tensor)]
        device = patch_features.device.type
        choice = "fused" if device in devices and not fused.is_transformed(*features) else "eager"
        if choice not in self._logged:
            self._logged.add(choice)
            _log_choice(choice, f"on {device}")
        return choice == "fused"


def _mean_over_all(mean_here: Tensor, here: Tensor, world_size: int) -> Tensor:
    """A rank's mean over its number `here` as its share of the mean over all ranks: divided by their mean number."""
    everywhere = here.clone()
    dist.all_reduce(everywhere)
    return mean_here * here * world_size / everywhere.clamp(min=1)


# Runs once while a graph is traced, instead of breaking it.
@torch.compiler.assume_constant_result
def _log_choice(choice: str, where: str) -> None:
    logger.debug("implementation='auto' takes the %s fine-grained loss %s", choice, where)
