"""PACL: every caption pools the patches of every image by their similarity to it (arXiv 2212.04994)."""

from typing import Literal

import torch
from torch import Tensor, nn

from sparc_loss._validation import check_choice, check_features
from sparc_loss.functional import _einsum, _full_precision, _l2_normalised, zero_where_masked
from sparc_loss.losses.all_pairs import all_pairs_loss, check_masks
from sparc_loss.losses.objective import Objective

Weighting = Literal["cosine", "sigmoid", "softmax"]

WEIGHTINGS: tuple[Weighting, ...] = ("cosine", "sigmoid", "softmax")


class PaclLoss(Objective):
    """InfoNCE on the cosine between a caption's global embedding and the image's patches, pooled for that caption.

    Image i as caption c sees it is the sum of its patches weighted by their cosine with the caption's global text
    embedding, as the SPARC paper describes PACL. Such a weight may be negative: a patch and its opposite then count
    the same, and the image never opposes the caption. PACL itself brings the cosines into [0, 1] first; accounts of
    it have a sigmoid or a softmax over patches, and both are here. The temperature is `logit_scale`, shared with the
    global loss. Tokens are not used, and a caption without any still has its global embedding. Alone, it trains
    patches and texts: the pooled image feature, by which open_clip evaluates, learns only what it shares with patches.

    Over W ranks of B pairs each rank receives the text embeddings of all, W * B * D numbers; patches stay where they
    are, so P may differ between ranks, B not. See `sparc_loss.losses.all_pairs` for the rest, with L = 1.

    Args:
        global_weight: weight of the global loss; PACL has none, 0.
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
        global_loss: nn.Module | None = None,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
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
        check_choice("weighting", weighting, WEIGHTINGS)
        self.weighting = weighting

    def fine_grained_term(
        self,
        *,
        text_features: Tensor,
        logit_scale: Tensor | float,
        patch_features: Tensor,
        token_features: Tensor,
        token_mask: Tensor,
        patch_mask: Tensor | None,
        region_mask: Tensor | None,
        **_: Tensor,
    ) -> Tensor:
        """Contrast by pooled patches of all pairs on all ranks, a scalar."""
        check_features("b d, b p d", text_features=text_features, patch_features=patch_features)
        usable_patches = check_masks("PaclLoss", patch_features, token_features, token_mask, patch_mask, region_mask)
        patch_features = zero_where_masked(patch_features, patch_mask)
        patch_mask = usable_patches

        def score(patches: Tensor, patch_mask: Tensor, texts: Tensor, text_mask: Tensor) -> Tensor:
            return pooled_cosine(patches, patch_mask, texts[:, 0], self.weighting).expand(2, -1, -1)

        # To score it block by block, each caption is one token: its global embedding.
        texts = _l2_normalised(text_features)[:, None]
        text_mask = torch.ones(texts.shape[:2], dtype=torch.bool, device=texts.device)
        return all_pairs_loss(
            score, _full_precision(patch_features), patch_mask, texts, text_mask, logit_scale, self.world_size
        )


def pooled_cosine(patches: Tensor, patch_mask: Tensor, texts: Tensor, weighting: Weighting) -> Tensor:
    """Cosine [I, C] of unit texts [C, D] and the patches [I, P, D] pooled for each of them."""
    weights = _einsum(_l2_normalised(patches), texts, "i p d, c d -> i c p")
    if weighting == "softmax":
        # Over padding too: that changes the weights' sum, which the cosine does not see.
        weights = weights.softmax(dim=-1)
    elif weighting == "sigmoid":
        weights = weights.sigmoid()
    pooled = _einsum(weights.masked_fill(~patch_mask[:, None], 0), patches, "i c p, i p d -> i c d")
    return _einsum(_l2_normalised(pooled), texts, "i c d, c d -> i c")
