"""FILIP: late interaction of every image's patches with every caption's tokens (arXiv 2111.07783)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparc_loss._arithmetic import l2_normalised, product
from sparc_loss._checks import check_number
from sparc_loss.losses.all_pairs import all_pairs_loss
from sparc_loss.losses.objective import GlobalLossArguments, Objective
from sparc_loss.losses.outputs import ModelOutputs

if TYPE_CHECKING:
    from typing_extensions import Unpack


class FilipLoss(Objective):
    """InfoNCE on late interaction; with `global_weight` above 0 it is the CLIP + FILIP of the SPARC paper.

    The image-to-text score is the mean over the image's patches of each patch's highest cosine with a token. The
    text-to-image score is the mean over the caption's tokens of each token's highest cosine with a patch. The
    temperature is `logit_scale`, shared with the global loss. Without a global loss it trains patches and tokens only:
    the pooled features, with which open_clip evaluates, learn through the weights that they share with them.

    As in the SPARC paper's re-implementation, 20 % of the tokens are dropped in training. They are drawn at random
    from the patches of each image and the tokens of each caption, and at least one is kept. Each rank draws for its
    own pairs from the default generator, and all ranks then use the same.

    See `sparc_loss.losses.all_pairs` for its cost over W ranks.

    Args:
        global_weight: weight of the global loss; 0 is FILIP as published, which the SPARC paper found unstable.
        fine_grained_weight: weight of the late interaction.
        token_dropping: share of patches and tokens dropped in training mode, in [0, 1), rounded down to whole ones.
        fine_grained_scale, global_loss, local_loss, gather_with_grad, cache_labels, rank, world_size: see `Objective`.

    Raises:
        TypeError, ValueError, ImportError: as `Objective`; a token_dropping that is not a number in [0, 1).
    """

    settings = ("global_weight", "fine_grained_weight", "token_dropping", "fine_grained_scale")

    def __init__(
        self,
        global_weight: float = 0.0,
        fine_grained_weight: float = 1.0,
        token_dropping: float = 0.2,
        fine_grained_scale: float | None = None,
        **shared: "Unpack[GlobalLossArguments]",
    ) -> None:
        super().__init__(global_weight, fine_grained_weight, fine_grained_scale, **shared)
        check_token_dropping("token_dropping", token_dropping)
        self.token_dropping = token_dropping

    def fine_grained_term(self, outputs: ModelOutputs) -> Tensor:
        """Late interaction of all pairs on all ranks, a scalar."""
        patches, patch_mask, tokens, token_mask = outputs.without_regions("FilipLoss")
        if self.training and self.token_dropping > 0:
            patch_mask = with_dropped(patch_mask, self.token_dropping)
            token_mask = with_dropped(token_mask, self.token_dropping)
        patches, tokens = l2_normalised(patches), l2_normalised(tokens)
        return all_pairs_loss(
            late_interaction, patches, patch_mask, tokens, token_mask, outputs.logit_scale, self.world_size
        )


def check_token_dropping(name: str, value: float) -> None:
    """Raise TypeError unless `value` is a real number, ValueError unless it is in [0, 1)."""
    check_number(name, value, 0, 1)
    if value == 1:
        raise ValueError(f"{name} is 1; expected a number below 1")


def late_interaction(patches: Tensor, patch_mask: Tensor, tokens: Tensor, token_mask: Tensor) -> Tensor:
    """Scores [2, I, C] from unit patches [I, P, D], unit tokens [C, L, D] and their masks, each row with a True."""
    cosine = product(patches, tokens, "i p d, c l d -> i c p l")
    best_token = cosine.masked_fill(~token_mask[None, :, None, :], -torch.inf).amax(dim=3)
    best_patch = cosine.masked_fill(~patch_mask[:, None, :, None], -torch.inf).amax(dim=2)
    return torch.stack([_masked_mean(best_token, patch_mask[:, None]), _masked_mean(best_patch, token_mask[None])])


def with_dropped(mask: Tensor, share: float) -> Tensor:
    """The mask, bool [B, N], without `share` of each row's True positions, chosen at random; rounded down."""
    number = mask.sum(dim=1, keepdim=True)
    kept = number - (share * number.double()).floor()
    place = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, 2).argsort(dim=1).argsort(dim=1)
    return mask & (place < kept)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the last axis where `mask` is True, which it is at least once in each row."""
    return values.masked_fill(~mask, 0).sum(dim=-1) / mask.sum(dim=-1)
