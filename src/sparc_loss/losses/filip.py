"""FILIP: late interaction of every image's patches with every caption's tokens (arXiv 2111.07783)."""

import torch
from torch import Tensor, nn

from sparc_loss._validation import check_number
from sparc_loss.functional import _einsum, _l2_normalised, zero_where_masked
from sparc_loss.losses.all_pairs import all_pairs_loss, check_masks, masked_mean
from sparc_loss.losses.objective import Objective


class FilipLoss(Objective):
    """InfoNCE on late interaction; `global_weight` above 0 makes it the CLIP + FILIP of the SPARC paper.

    An image scores a caption by the mean over its patches of each one's highest cosine with a token (image to text),
    a caption an image by the mean over its tokens of each one's highest cosine with a patch (text to image). The
    temperature is `logit_scale`, shared with the global loss. Alone, it trains patches and tokens: the pooled
    features, by which open_clip evaluates, learn only what they share with them.

    As in the SPARC paper's re-implementation, 20 % of the tokens are dropped while training. We draw them at random
    among the patches of each image and the tokens of each caption, never the last one, from the default generator:
    each rank draws for its own pairs, and every rank then sees the same.

    See `sparc_loss.losses.all_pairs` for what it costs over W ranks.

    Args:
        global_weight: weight of the global loss; 0 is FILIP as published, which the SPARC paper found unstable.
        fine_grained_weight: weight of the late interaction.
        token_dropping: share of patches and tokens left out in training mode, in [0, 1), rounded down to whole ones.
        fine_grained_scale, global_loss, local_loss, gather_with_grad, cache_labels, rank, world_size: see `Objective`.

    Raises:
        TypeError, ValueError, ImportError: as `Objective`; a token_dropping that is no number or outside [0, 1).
    """

    settings = ("global_weight", "fine_grained_weight", "token_dropping", "fine_grained_scale")

    def __init__(
        self,
        global_weight: float = 0.0,
        fine_grained_weight: float = 1.0,
        token_dropping: float = 0.2,
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
        check_number("token_dropping", token_dropping, 0, 1)
        if token_dropping == 1:
            raise ValueError("token_dropping is 1; expected a number below 1")
        self.token_dropping = token_dropping

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
        """Late interaction of all pairs on all ranks, a scalar."""
        usable_patches = check_masks("FilipLoss", patch_features, token_features, token_mask, patch_mask, region_mask)
        patch_features = zero_where_masked(patch_features, patch_mask)
        token_features = zero_where_masked(token_features, token_mask)
        patch_mask = usable_patches
        if self.training and self.token_dropping > 0:
            patch_mask = with_dropped(patch_mask, self.token_dropping)
            token_mask = with_dropped(token_mask, self.token_dropping)
        return all_pairs_loss(
            late_interaction,
            _l2_normalised(patch_features),
            patch_mask,
            _l2_normalised(token_features),
            token_mask,
            logit_scale,
            self.world_size,
        )


def late_interaction(patches: Tensor, patch_mask: Tensor, tokens: Tensor, token_mask: Tensor) -> Tensor:
    """Scores [2, I, C] from unit patches [I, P, D], unit tokens [C, L, D] and their masks, each row with a True."""
    cosine = _einsum(patches, tokens, "i p d, c l d -> i c p l")
    best_token = cosine.masked_fill(~token_mask[None, :, None, :], -torch.inf).amax(dim=3)
    best_patch = cosine.masked_fill(~patch_mask[:, None, :, None], -torch.inf).amax(dim=2)
    return torch.stack([masked_mean(best_token, patch_mask[:, None]), masked_mean(best_patch, token_mask[None])])


def with_dropped(mask: Tensor, share: float) -> Tensor:
    """The mask, bool [B, N], without `share` of each row's True positions, chosen at random; rounded down."""
    number = mask.sum(dim=1, keepdim=True)
    kept = number - (share * number.double()).floor()
    place = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, 2).argsort(dim=1).argsort(dim=1)
    return mask & (place < kept)
