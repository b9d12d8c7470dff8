"""SPARC: open_clip's global loss plus the fine-grained loss within each pair (arXiv 2401.09865, Eq. 7)."""

import logging

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparc_loss import functional, fused
from sparc_loss._validation import check_choice, check_features, check_number
from sparc_loss.functional import (
    ALIGNMENTS,
    REDUCTIONS,
    Alignment,
    Reduction,
    countable_tokens,
)

IMPLEMENTATIONS = ("auto", "eager", "fused")

logger = logging.getLogger(__name__)


class SparcLoss(nn.Module):
    """lambda_g L_g + lambda_f L_f (Eq. 7), with open_clip's ClipLoss as L_g and its constructor arguments.

    Over W ranks the gradient that DistributedDataParallel averages equals that of one process on the whole batch.
    The fine-grained half gathers nothing; with `reduction="token"` it all-reduces one integer.

    Args:
        global_weight: lambda_g; scales the `contrastive_loss` of the global loss. 0 skips that half's work.
        fine_grained_weight: lambda_f. 0 skips that half's work.
        threshold: sigma of Eq. 3 in [0, 1]; None is the paper's 1/P.
        alignment: "sparse" (the paper), "dense" (no Eq. 3) or "softmax" (over patches, instead of Eqs. 2-4).
        reduction: "token" (the paper's Listing 1) or "sample" (its Eq. 6).
        fine_grained_scale: 1/tau of the fine-grained half; None shares the model's learned `logit_scale` (the paper).
        implementation: "eager" takes the plain functions of `sparc_loss.functional`, differentiable to any order and
            compiled without a graph break; "fused" takes `sparc_loss.fused`, cheaper, with first derivatives only and
            a graph break under torch.compile. "auto" takes "fused" on CPU and CUDA outside torch.compile, else
            "eager", and logs which at debug level when that changes.
        global_loss: a module called like open_clip's losses and returning a dict with `contrastive_loss`, such as
            SigLipLoss or CoCaLoss; its other terms pass through unweighted. None makes a ClipLoss.
        local_loss, gather_with_grad, cache_labels, rank, world_size: as in open_clip's ClipLoss.

    Raises:
        TypeError: a weight, threshold or scale that is no number.
        ValueError: a negative weight, a threshold outside [0, 1], a scale not above 0, an unknown `alignment`,
            `reduction` or `implementation`; `world_size > 1` without `gather_with_grad=True`, or a `global_loss`
            of another world_size.
        ImportError: `global_loss` is None and open_clip is not installed.

    Example:
        >>> loss = SparcLoss()
        >>> total = loss(**model(images, texts))                     # doctest: +SKIP
        >>> parts = loss(**model(images, texts), output_dict=True)   # doctest: +SKIP
    """

    def __init__(
        self,
        global_weight: float = 0.5,
        fine_grained_weight: float = 1.0,
        threshold: float | None = None,
        alignment: Alignment = "sparse",
        reduction: Reduction = "token",
        fine_grained_scale: float | None = None,
        implementation: str = "auto",
        global_loss: nn.Module | None = None,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        check_number("global_weight", global_weight, 0)
        check_number("fine_grained_weight", fine_grained_weight, 0)
        if threshold is not None:
            check_number("threshold", threshold, 0, 1)
        check_choice("alignment", alignment, ALIGNMENTS)
        check_choice("reduction", reduction, REDUCTIONS)
        if fine_grained_scale is not None:
            check_number("fine_grained_scale", fine_grained_scale, 0)
            if fine_grained_scale == 0:
                raise ValueError("fine_grained_scale is 0; expected a number above 0")
        check_choice("implementation", implementation, IMPLEMENTATIONS)
        if world_size > 1 and not (gather_with_grad and getattr(global_loss, "gather_with_grad", True)):
            raise ValueError(
                f"gather_with_grad is False with world_size {world_size}; expected True: without it the global "
                f"loss's gradient is 1/{world_size} of one process's, and its ratio to the fine-grained one changes "
                "with the number of processes (local_loss may be either)"
            )
        if getattr(global_loss, "world_size", world_size) != world_size:
            raise ValueError(
                f"global_loss has world_size {global_loss.world_size}; expected the same as SparcLoss, {world_size}"
            )

        self.global_weight = global_weight
        self.fine_grained_weight = fine_grained_weight
        self.threshold = threshold
        self.alignment = alignment
        self.reduction = reduction
        self.fine_grained_scale = fine_grained_scale
        self.implementation = implementation
        self._logged: str | None = None
        self.world_size = world_size
        self.global_loss = global_loss or _clip_loss()(
            local_loss=local_loss,
            gather_with_grad=gather_with_grad,
            cache_labels=cache_labels,
            rank=rank,
            world_size=world_size,
        )

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        patch_features: Tensor,
        token_features: Tensor,
        token_mask: Tensor,
        logit_bias: Tensor | None = None,
        patch_mask: Tensor | None = None,
        region_mask: Tensor | None = None,
        output_dict: bool = False,
        **others: Tensor,
    ) -> Tensor | dict[str, Tensor]:
        """Loss of a batch; the arguments are what a model from `surface_embeddings` returns in training mode.

        Args:
            image_features: [B, D], L2-normalised.
            text_features: [B, D], L2-normalised.
            logit_scale: 1/tau, one element (`model.logit_scale.exp()`).
            patch_features: [B, P, D], not normalised.
            token_features: [B, L, D], not normalised.
            token_mask: bool [B, L], True for the tokens that count.
            logit_bias: one element or None, for SigLipLoss.
            patch_mask: bool [B, P] or None, False for padding patches.
            region_mask: bool [B, L, P] or None, True for the patches a token may use.
            output_dict: return the weighted terms by name instead of their sum.
            others: the model's further outputs, handed to `global_loss`.

        Returns:
            Scalar, or {"contrastive_loss": ..., "fine_grained_loss": ..., and the global loss's other terms},
            already weighted, whose sum is that scalar.

        Raises:
            TypeError: features not floating point, a mask not bool.
            ValueError: ranks, sizes or devices that disagree.
        """
        check_features(
            "b c, b c, b p d, b l d",
            image_features=image_features,
            text_features=text_features,
            patch_features=patch_features,
            token_features=token_features,
        )
        terms = self._global_terms(image_features, text_features, logit_scale, logit_bias, others)
        terms["fine_grained_loss"] = self._fine_grained_term(
            patch_features, token_features, token_mask, logit_scale, patch_mask, region_mask
        )
        return terms if output_dict else sum(terms.values())

    def extra_repr(self) -> str:
        """The settings, for `print(loss)`."""
        names = ("global_weight", "fine_grained_weight", "threshold", "alignment", "reduction")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in (*names, "fine_grained_scale"))

    def _global_terms(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        others: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        if self.global_weight == 0 and not others:
            # DistributedDataParallel waits for the gradient of every parameter: keep what only this half uses.
            used = [image_features, text_features, logit_scale, logit_bias]
            return {"contrastive_loss": 0 * sum(each.float().sum() for each in used if isinstance(each, Tensor))}
        # CoCaLoss and DistillClipLoss know no logit_bias.
        bias = {} if logit_bias is None else {"logit_bias": logit_bias}
        terms = self.global_loss(
            image_features=image_features,
            text_features=text_features,
            logit_scale=logit_scale,
            output_dict=True,
            **bias,
            **others,
        )
        return {**terms, "contrastive_loss": self.global_weight * terms["contrastive_loss"]}

    def _fine_grained_term(
        self,
        patch_features: Tensor,
        token_features: Tensor,
        token_mask: Tensor,
        logit_scale: Tensor,
        patch_mask: Tensor | None,
        region_mask: Tensor | None,
    ) -> Tensor:
        if self.fine_grained_weight == 0:
            return patch_features.new_zeros((), dtype=torch.float32)
        fine_grained_loss = fused.fine_grained_loss if self._fuses(patch_features) else functional.fine_grained_loss
        loss = fine_grained_loss(
            patch_features,
            token_features,
            token_mask,
            logit_scale if self.fine_grained_scale is None else self.fine_grained_scale,
            threshold=self.threshold,
            alignment=self.alignment,
            reduction=self.reduction,
            patch_mask=patch_mask,
            region_mask=region_mask,
        )
        if self.reduction == "token" and self.world_size > 1:
            # A rank's own mean becomes its share of the mean over all ranks: divide by the mean number of tokens.
            here = countable_tokens(token_features, patch_features, token_mask, patch_mask, region_mask).sum()
            everywhere = here.clone()
            dist.all_reduce(everywhere)
            loss = loss * here * self.world_size / everywhere.clamp(min=1)
        return self.fine_grained_weight * loss

    def _fuses(self, patch_features: Tensor) -> bool:
        if self.implementation != "auto":
            return self.implementation == "fused"
        if torch.compiler.is_compiling():
            _log_choice("eager", "inside torch.compile")
            return False
        device = patch_features.device.type
        choice = "fused" if device in ("cpu", "cuda") else "eager"
        if choice != self._logged:
            self._logged = choice
            _log_choice(choice, f"on {device}")
        return choice == "fused"


# Runs once while a graph is traced, instead of breaking it.
@torch.compiler.assume_constant_result
def _log_choice(choice: str, where: str) -> None:
    logger.debug("implementation='auto' takes the %s fine-grained loss %s", choice, where)


def _clip_loss() -> type[nn.Module]:
    try:
        from open_clip.loss import ClipLoss
    except ImportError as error:
        raise ImportError(
            "SparcLoss() uses open_clip's ClipLoss as its global loss, and open_clip cannot be imported "
            f"({error}); pip install 'sparc-loss[train]', or pass global_loss"
        ) from error
    return ClipLoss
