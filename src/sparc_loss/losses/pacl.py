"""PACL: every caption pools the patches of every image by their similarity to it (arXiv 2212.04994)."""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from sparc_loss._arithmetic import full_precision, l2_normalised, product
from sparc_loss._checks import check_choice, check_features
from sparc_loss.losses.all_pairs import all_pairs_loss
from sparc_loss.losses.objective import GlobalLossArguments, Objective
from sparc_loss.losses.outputs import ModelOutputs

if TYPE_CHECKING:
    from typing_extensions import Unpack

Weighting = Literal["cosine", "sigmoid", "softmax"]

WEIGHTINGS: tuple[Weighting, ...] = ("cosine", "sigmoid", "softmax")


class PaclLoss(Objective):
    """InfoNCE on the cosine between a caption's global embedding and the image's patches, pooled for that caption.

    For caption c, the feature of image i is the sum of its patches, weighted by their cosine with the caption's global
    text embedding, as the SPARC paper describes PACL. Such a weight may be negative: then a patch and its negative
    contribute the same, and the cosine of image and caption is never negative. PACL itself maps the cosines to [0, 1];
    descriptions of it use a sigmoid or a softmax over patches, and both are available. The temperature is
    `logit_scale`, shared with the global loss. Tokens are not used; a caption without tokens still has its global
    embedding. Without a global loss it trains patches and texts only: the pooled image feature, with which open_clip
    evaluates, learns through the weights that it shares with the patches.

    Over W ranks of B pairs, each rank receives the text embeddings of all ranks, W * B * D numbers. Patches are not
    exchanged, so P may differ between ranks; B must not. See `sparc_loss.losses.all_pairs` for the rest, with L = 1.

    Args:
        global_weight: weight of the global loss; 0 in PACL.
        fine_grained_weight: weight of the contrast by patches.
        weighting: of the patches: "cosine" (the SPARC paper), "sigmoid" of it or "softmax" over patches (PACL).
        fine_grained_scale, global_loss, local_loss, gather_with_grad, cache_labels, rank, world_size: see `Objective`.

    Raises:
        TypeError, ValueError, ImportError: as `Objective`; an unknown weighting.
    """

    settings = ("global_weight", "fine_grained_weight", "weighting", "fine_grained_scale")

    def __init__(
        self,
        global_weight: float = 0.0,
        fine_grained_weight: float = 1.0,
        weighting: Weighting = "cosine",
        fine_grained_scale: float | None = None,
        **shared: "Unpack[GlobalLossArguments]",
    ) -> None:
        super().__init__(global_weight, fine_grained_weight, fine_grained_scale, **shared)
        check_choice("weighting", weighting, WEIGHTINGS)
        self.weighting = weighting

    def fine_grained_term(self, outputs: ModelOutputs) -> Tensor:
        """Contrast by pooled patches of all pairs on all ranks, a scalar."""
        text_features = outputs.text_features
        check_features("b d, b p d", text_features=text_features, patch_features=outputs.patch_features)
        patches, patch_mask, _, _ = outputs.without_regions("PaclLoss")

        def score(patches: Tensor, patch_mask: Tensor, texts: Tensor, text_mask: Tensor) -> Tensor:
            return pooled_cosine(patches, patch_mask, texts[:, 0], self.weighting).expand(2, -1, -1)

        # all_pairs_loss takes tokens: each caption has one, its global embedding.
        patches, texts = full_precision(patches), l2_normalised(text_features)[:, None]
        text_mask = torch.ones(texts.shape[:2], dtype=torch.bool, device=texts.device)
        return all_pairs_loss(score, patches, patch_mask, texts, text_mask, outputs.logit_scale, self.world_size)


def pooled_cosine(patches: Tensor, patch_mask: Tensor, texts: Tensor, weighting: Weighting) -> Tensor:
    """Cosine [I, C] of unit texts [C, D] and the patches [I, P, D], pooled for each text."""
    weights = product(l2_normalised(patches), texts, "i p d, c d -> i c p")
    if weighting == "softmax":
        # Over padding, too: it changes the sum of the weights, on which the cosine does not depend.
        weights = weights.softmax(dim=-1)
    elif weighting == "sigmoid":
        weights = weights.sigmoid()
    pooled = product(weights.masked_fill(~patch_mask[:, None], 0), patches, "i c p, i p d -> i c d")
    return product(l2_normalised(pooled), texts, "i c d, c d -> i c")
