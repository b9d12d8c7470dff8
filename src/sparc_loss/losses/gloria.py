"""GLoRIA: every token attends to the patches of every image, and captions are matched by that (ICCV 2021)."""

import torch
from torch import Tensor, nn

from sparc_loss.functional import _einsum, _full_precision, _l2_normalised, zero_where_masked
from sparc_loss.losses.all_pairs import all_pairs_loss, check_masks
from sparc_loss.losses.objective import Objective, check_positive


class GloriaLoss(Objective):
    """InfoNCE on a soft maximum over tokens of the cosine between token and attended patches; plus the global loss.

    Of image i and token t: weights are a softmax over the patches of t . v_p / sqrt(D), as the SPARC paper scales
    them in place of GLoRIA's first temperature; the context is the patches' sum by these weights. Image and caption
    match by log sum_l exp(cos(context_l, t_l) * matching_scale) / matching_scale, over the tokens as they are, without
    merging word pieces. Both directions share that match, and `logit_scale` is the temperature of the contrast.

    See `sparc_loss.losses.all_pairs` for what it costs over W ranks; a token here needs its context too, so a pair
    costs L * (2 P + 1) * D multiplications, twice FILIP's.

    Args:
        global_weight: weight of the global loss; GLoRIA has it at 1.
        fine_grained_weight: weight of the contrast by attention.
        matching_scale: 1/temperature of the soft maximum; 5 is that of GLoRIA's code.
        fine_grained_scale, global_loss, local_loss, gather_with_grad, cache_labels, rank, world_size: see `Objective`.

    Raises:
        TypeError, ValueError, ImportError: as `Objective`; a matching_scale that is no number above 0.
    """

    settings = ("global_weight", "fine_grained_weight", "matching_scale", "fine_grained_scale")

    def __init__(
        self,
        global_weight: float = 1.0,
        fine_grained_weight: float = 1.0,
        matching_scale: float = 5.0,
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
        check_positive("matching_scale", matching_scale)
        self.matching_scale = matching_scale

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
        """Contrast by attention of all pairs on all ranks, a scalar."""
        usable_patches = check_masks("GloriaLoss", patch_features, token_features, token_mask, patch_mask, region_mask)
        patch_features = zero_where_masked(patch_features, patch_mask)
        token_features = zero_where_masked(token_features, token_mask)
        patch_mask = usable_patches

        def score(patches: Tensor, patch_mask: Tensor, tokens: Tensor, token_mask: Tensor) -> Tensor:
            match = attention_match(patches, patch_mask, tokens, token_mask, self.matching_scale)
            return match.expand(2, -1, -1)

        return all_pairs_loss(
            score,
            _full_precision(patch_features),
            patch_mask,
            _full_precision(token_features),
            token_mask,
            logit_scale,
            self.world_size,
        )


def attention_match(
    patches: Tensor, patch_mask: Tensor, tokens: Tensor, token_mask: Tensor, matching_scale: float
) -> Tensor:
    """Match [I, C] of patches [I, P, D] and tokens [C, L, D], given their masks, each row with a True."""
    similarity = _einsum(patches, tokens, "i p d, c l d -> i c l p") / patches.shape[-1] ** 0.5
    weights = similarity.masked_fill(~patch_mask[:, None, None, :], -torch.inf).softmax(dim=-1)
    context = _l2_normalised(_einsum(weights, patches, "i c l p, i p d -> i c l d"))
    cosine = _einsum(context, _l2_normalised(tokens), "i c l d, c l d -> i c l")
    exponents = (cosine * matching_scale).masked_fill(~token_mask, -torch.inf)
    return exponents.logsumexp(dim=-1) / matching_scale
