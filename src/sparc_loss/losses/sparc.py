"""SPARC: open_clip's global loss plus the fine-grained loss within each pair (arXiv 2401.09865, Eq. 7).

With `image_negatives`, which is not in the paper, it also contrasts the alignment of each pair with other images.
"""

import logging
import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from sparc_loss import functional, fused
from sparc_loss._checks import check_choice, check_number, check_whole_number
from sparc_loss._masks import valid_tokens
from sparc_loss.diagnostics import alignment_diagnostics
from sparc_loss.functional import DIRECTIONS, Alignment, AlignmentSettings, Direction, Reduction
from sparc_loss.losses.distributed import mean_over_ranks
from sparc_loss.losses.objective import GlobalLossArguments, Objective
from sparc_loss.losses.outputs import ModelOutputs

if TYPE_CHECKING:
    from typing_extensions import Unpack

Implementation = Literal["auto", "eager", "fused"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("auto", "eager", "fused")

logger = logging.getLogger(__name__)


class SparcLoss(Objective):
    """lambda_g L_g + lambda_f L_f (Eq. 7), with open_clip's ClipLoss as L_g and its constructor arguments.

    Over W ranks the gradient that DistributedDataParallel averages equals that of one process on the whole batch.
    The fine-grained half gathers nothing; with `reduction="token"` it all-reduces one integer.

    `image_negatives` adds `image_contrastive_weight` times `functional.image_contrastive_loss`. Its negatives are
    images of the rank's own batch. Over W ranks it is the mean over the captions of all ranks, each contrasted with
    other images of its rank. It gathers nothing either, and all-reduces one more integer.

    Args:
        global_weight: lambda_g; scales the `contrastive_loss` of the global loss. 0 skips its computation.
        fine_grained_weight: lambda_f. 0 skips its computation.
        threshold: sigma of Eq. 3 in [0, 1]; None is the paper's 1/P.
        alignment: "sparse" (the paper), "dense" (no Eq. 3) or "softmax" (over patches, instead of Eqs. 2-4).
        reduction: "token" (the paper's Listing 1) or "sample" (its Eq. 6).
        fine_grained_scale: 1/tau of the fine-grained half; None shares the model's learned `logit_scale` (the paper).
        image_negatives: K, the number of other images with which each caption's alignment is contrasted; it costs
            1 + K alignments. A batch with fewer other images uses all of them. 0 is the paper.
        image_contrastive_weight: of that contrast. 0 skips its computation. Its other settings are those of the
            fine-grained half.
        image_contrastive_threshold: sigma of Eq. 3 of that contrast; 1 keeps each token's highest patch alone. None is
            `threshold`.
        image_contrastive_direction: "text_to_image", or "both": images also choose among captions.
        implementation: "eager" uses `sparc_loss.functional`, differentiable to any order and compiled without a graph
            break. "fused" uses `sparc_loss.fused`, cheaper, with first derivatives only and a graph break under
            torch.compile. "auto" uses "fused" on the CPU and on CUDA, and "eager" on other devices, in torch.compile,
            torch.func and forward-mode differentiation. It logs each choice once, at debug level.
        diagnostics: with `output_dict=True`, also return the numbers of `sparc_loss.diagnostics`, which are not terms
            of the loss and have no gradient. Use it in a loop that sums only the keys ending in `_loss` and logs the
            others, such as that of open_clip 4.
        metrics: the old name of `diagnostics`; deprecated.
        global_loss: a module called like open_clip's losses and returning a dict with `contrastive_loss`, such as
            SigLipLoss or CoCaLoss; its other terms are passed through unweighted. None creates a ClipLoss.
        local_loss, gather_with_grad, cache_labels, rank, world_size: as in open_clip's ClipLoss.

    Raises:
        TypeError: a weight, threshold or scale that is not a number, a K that is not a whole number.
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
        "image_contrastive_threshold",
        "image_contrastive_direction",
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
        image_contrastive_threshold: float | None = None,
        image_contrastive_direction: Direction = "text_to_image",
        implementation: Implementation = "auto",
        diagnostics: bool = False,
        metrics: bool | None = None,
        **shared: "Unpack[GlobalLossArguments]",
    ) -> None:
        super().__init__(global_weight, fine_grained_weight, fine_grained_scale, **shared)
        AlignmentSettings(threshold, alignment, reduction)  # checks them
        check_choice("implementation", implementation, IMPLEMENTATIONS)
        check_whole_number("image_negatives", image_negatives, 0)
        check_number("image_contrastive_weight", image_contrastive_weight, 0)
        if image_contrastive_threshold is not None:
            check_number("image_contrastive_threshold", image_contrastive_threshold, 0, 1)
        check_choice("image_contrastive_direction", image_contrastive_direction, DIRECTIONS)
        if metrics is not None:
            warnings.warn("SparcLoss(metrics=...) is now diagnostics=...", DeprecationWarning, stacklevel=2)

        self.threshold = threshold
        self.alignment = alignment
        self.reduction = reduction
        self.image_negatives = image_negatives
        self.image_contrastive_weight = image_contrastive_weight
        self.image_contrastive_threshold = image_contrastive_threshold
        self.image_contrastive_direction = image_contrastive_direction
        self.implementation = implementation
        self.diagnostics = diagnostics if metrics is None else metrics
        self._logged: set[str] = set()

    def fine_grained_term(self, outputs: ModelOutputs) -> Tensor:
        """L_f of this rank's captions, scaled so that the mean over ranks is L_f of the whole batch."""
        fuse = self._fuses(outputs)
        function = fused.fine_grained_loss if fuse else functional.fine_grained_loss
        loss = function(**_local(outputs), logit_scale=outputs.logit_scale, **self._settings())
        if self.reduction == "token" and self.world_size > 1:
            loss = mean_over_ranks(loss, _valid_tokens(outputs).sum(), self.world_size)
        return loss

    def further_terms(self, outputs: ModelOutputs) -> dict[str, Tensor]:
        """{"image_contrastive_loss": ...}, weighted and scaled as the fine-grained term, if there are negatives."""
        if self.image_negatives == 0 or self.image_contrastive_weight == 0:
            return {}
        fuse = self._fuses(outputs)
        function = fused.image_contrastive_loss if fuse else functional.image_contrastive_loss
        settings = {
            **self._settings(),
            "image_negatives": self.image_negatives,
            "direction": self.image_contrastive_direction,
        }
        if self.image_contrastive_threshold is not None:
            settings["threshold"] = self.image_contrastive_threshold
        loss = function(**_local(outputs), logit_scale=outputs.logit_scale, **settings)
        if self.reduction == "token" and self.world_size > 1:
            loss = mean_over_ranks(loss, _valid_tokens(outputs).any(dim=1).sum(), self.world_size)
        return {"image_contrastive_loss": self.image_contrastive_weight * loss}

    def diagnostics_of(self, outputs: ModelOutputs) -> dict[str, Tensor]:
        """The numbers of `alignment_diagnostics`, if the constructor was asked for them."""
        if not self.diagnostics:
            return {}
        return alignment_diagnostics(**_local(outputs), threshold=self.threshold, alignment=self.alignment)

    def _settings(self) -> dict[str, Any]:
        return {"threshold": self.threshold, "alignment": self.alignment, "reduction": self.reduction}

    def _fuses(self, outputs: ModelOutputs) -> bool:
        """Whether to use the fused form."""
        if self.implementation != "auto":
            return self.implementation == "fused"
        if torch.compiler.is_compiling():
            _log_choice("eager", "inside torch.compile")
            return False
        features = (outputs.patch_features, outputs.token_features, outputs.logit_scale)
        tensors = [each for each in features if isinstance(each, Tensor)]
        device = outputs.patch_features.device.type
        choice = "fused" if device in ("cpu", "cuda") and not fused.is_transformed(*tensors) else "eager"
        if choice not in self._logged:
            self._logged.add(choice)
            _log_choice(choice, f"on {device}")
        return choice == "fused"


def _local(outputs: ModelOutputs) -> dict[str, Any]:
    names = ("patch_features", "token_features", "token_mask", "patch_mask", "region_mask")
    return {name: getattr(outputs, name) for name in names}


def _valid_tokens(outputs: ModelOutputs) -> Tensor:
    return valid_tokens(**_local(outputs))


# Runs once while a graph is traced, so that logging does not break the graph.
@torch.compiler.assume_constant_result
def _log_choice(choice: str, where: str) -> None:
    logger.debug("implementation='auto' uses the %s fine-grained loss %s", choice, where)
