"""Other ways to make SPARC's alignment look at its image than those the library offers, small enough to try."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sparc_loss import SparcLoss
from sparc_loss.functional import (
    alignment_weights,
    language_grouped_embeddings,
    sequence_contrastive_loss,
    token_patch_similarity,
)
from sparc_loss.losses.outputs import ModelOutputs

from ..scenes.scene import IMAGE_SIZE, generate_scene
from ..scenes.world import World
from .candidates import CandidateLoss


class StopGradientLoss(SparcLoss):
    """No gradient flows through the alignment weights: tokens choose their patches, and do not learn to."""

    def fine_grained_term(self, outputs: ModelOutputs) -> Tensor:
        return self._contrast(self._weights(outputs.token_features, outputs.patch_features).detach(), outputs)

    def _weights(self, token_features: Tensor, patch_features: Tensor) -> Tensor:
        similarity = token_patch_similarity(token_features, patch_features)
        return alignment_weights(similarity, self.threshold, self.alignment)

    def _contrast(self, weights: Tensor, outputs: ModelOutputs) -> Tensor:
        grouped = language_grouped_embeddings(weights, outputs.patch_features)
        return sequence_contrastive_loss(
            grouped, outputs.token_features, outputs.token_mask, outputs.logit_scale, self.reduction
        )


class NormalizedWeightsLoss(StopGradientLoss):
    """The weights come from cosines: a patch is not chosen for its length."""

    def fine_grained_term(self, outputs: ModelOutputs) -> Tensor:
        tokens, patches = (F.normalize(each, dim=-1) for each in (outputs.token_features, outputs.patch_features))
        return self._contrast(self._weights(tokens, patches), outputs)


CURES = {
    "stop-gradient": StopGradientLoss,
    "normalized weights": NormalizedWeightsLoss,
    "candidate": CandidateLoss,
}


def region_masks(world: World, count: int, grid: tuple[int, int], length: int) -> Tensor:
    """What the words of the first `count` training scenes may use, bool [count, length, patches].

    A word that tells colour, kind or size of an object: the patches whose centres lie in its box. Any other: all.
    For the tokenizer whose token i is word i.
    """
    masks = torch.ones(count, length, grid[0] * grid[1], dtype=torch.bool)
    for index in range(count):
        for each in generate_scene(world, "train", index).objects:
            inside = torch.stack([_patches_inside(box, grid) for box in each.boxes]).any(dim=0)
            for word in each.words.values():
                masks[index, word] = inside
    return masks


def _patches_inside(box: Sequence[int], grid: tuple[int, int]) -> Tensor:
    rows, columns = ((np.arange(number) + 0.5) * IMAGE_SIZE / number for number in grid)
    left, top, right, bottom = box
    inside = ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))[None, :]
    return torch.from_numpy(inside.ravel())
