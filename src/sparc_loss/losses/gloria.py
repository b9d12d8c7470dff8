"""GLoRIA: every token attends to the patches of every image, and captions are matched by the result (ICCV 2021)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparc_loss._arithmetic import full_precision, l2_normalised, product
from sparc_loss._checks import check_positive
from sparc_loss.losses.all_pairs import all_pairs_loss
from sparc_loss.losses.objective import GlobalLossArguments, Objective
from sparc_loss.losses.outputs import ModelOutputs

if TYPE_CHECKING:
    from typing_extensions import Unpack


class GloriaLoss(Objective):
    """InfoNCE on a soft maximum over tokens of the cosine between token and attended patches; plus the global loss.

    For image i and token t, the weights are a softmax over the patches of t . v_p / sqrt(D); the SPARC paper uses this
    factor in place of GLoRIA's first temperature. The context of t is the sum of the patches with these weights. The
    match of image and caption is log sum_l exp(cos(context_l, t_l) * matching_scale) / matching_scale over the tokens;
    word pieces are not merged. Both directions use this match, and `logit_scale` is the temperature of the contrast.

    See `sparc_loss.losses.all_pairs` for its cost over W ranks. A pair costs L * (2 P + 1) * D multiplications, twice
    as many as FILIP's, because of the contexts.

    Args:
        global_weight: weight of the global loss; 1 in GLoRIA.
        fine_grained_weight: weight of the contrast by attention.
        matching_scale: 1/temperature of the soft maximum; 5 as in GLoRIA's code.
        fine_grained_scale, global_loss, local_loss, gather_with_grad, cache_labels, rank, world_size: see `Objective`.

    Raises:
        TypeError, ValueError, ImportError: as `Objective`; a matching_scale that is not a number above 0.
    """

    settings = ("global_weight", "fine_grained_weight", "matching_scale", "fine_grained_scale")

    def __init__(
        self,
        global_weight: float = 1.0,
        fine_grained_weight: float = 1.0,
        matching_scale: float = 5.0,
        fine_grained_scale: float | None = None,
        **shared: "Unpack[GlobalLossArguments]",
    ) -> None:
        super().__init__(global_weight, fine_grained_weight, fine_grained_scale, **shared)
        check_positive("matching_scale", matching_scale)
        self.matching_scale = matching_scale

    def fine_grained_term(self, outputs: ModelOutputs) -> Tensor:
        """Contrast by attention of all pairs on all ranks, a scalar."""
        patches, patch_mask, tokens, token_mask = outputs.without_regions("GloriaLoss")

        def score(patches: Tensor, patch_mask: Tensor, tokens: Tensor, token_mask: Tensor) -> Tensor:
            match = attention_match(patches, patch_mask, tokens, token_mask, self.matching_scale)
            return match.expand(2, -1, -1)

        patches, tokens = full_precision(patches), full_precision(tokens)
        return all_pairs_loss(score, patches, patch_mask, tokens, token_mask, outputs.logit_scale, self.world_size)


def attention_match(
    patches: Tensor, patch_mask: Tensor, tokens: Tensor, token_mask: Tensor, matching_scale: float
) -> Tensor:
    """Match [I, C] of patches [I, P, D] and tokens [C, L, D], given their masks, each row with a True."""
    similarity = product(patches, tokens, "i p d, c l d -> i c l p") / patches.shape[-1] ** 0.5
    weights = similarity.masked_fill(~patch_mask[:, None, None, :], -torch.inf).softmax(dim=-1)
    context = l2_normalised(product(weights, patches, "i c l p, i p d -> i c l d"))
    cosine = product(context, l2_normalised(tokens), "i c l d, c l d -> i c l")
    exponents = (cosine * matching_scale).masked_fill(~token_mask, -torch.inf)
    return exponents.logsumexp(dim=-1) / matching_scale
