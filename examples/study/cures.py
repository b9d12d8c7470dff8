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

from ..digit_scenes.scenes import IMAGE_SIZE, generate_scene


class StopGradientLoss(SparcLoss):
    """No gradient flows through the alignment weights: tokens choose their patches, and do not learn to."""

    def fine_grained_term(self, *, patch_features: Tensor, token_features: Tensor, **outputs) -> Tensor:
        weights = self._weights(token_features, patch_features).detach()
        return self._contrast(weights, patch_features, token_features, **outputs)

    def _weights(self, token_features: Tensor, patch_features: Tensor) -> Tensor:
        return alignment_weights(
            token_patch_similarity(token_features, patch_features), self.threshold, self.alignment
        )

    def _contrast(
        self, weights: Tensor, patch_features: Tensor, token_features: Tensor, *, logit_scale, token_mask: Tensor, **_
    ) -> Tensor:
        grouped = language_grouped_embeddings(weights, patch_features)
        return sequence_contrastive_loss(grouped, token_features, token_mask, logit_scale, self.reduction)


class NormalizedWeightsLoss(StopGradientLoss):
    """The weights come from cosines: a patch is not chosen for its length."""

    def fine_grained_term(self, *, patch_features: Tensor, token_features: Tensor, **outputs) -> Tensor:
        weights = self._weights(F.normalize(token_features, dim=-1), F.normalize(patch_features, dim=-1))
        return self._contrast(weights, patch_features, token_features, **outputs)


CURES = {"stop-gradient": StopGradientLoss, "normalized weights": NormalizedWeightsLoss}


def region_masks(count: int, grid: tuple[int, int], length: int) -> Tensor:
    """What the words of the first `count` training scenes may use, bool [count, length, patches].

    A word that tells colour, kind or size of an object: the patches whose centres lie in its box. Any other: all.
    For the tokenizer whose token i is word i.
    """
    masks = torch.ones(count, length, grid[0] * grid[1], dtype=torch.bool)
    for index in range(count):
        for each in generate_scene("train", index).objects:
            inside = _patches_inside(each.box, grid)
            for word in each.words.values():
                masks[index, word] = inside
    return masks


def _patches_inside(box: Sequence[int], grid: tuple[int, int]) -> Tensor:
    rows, columns = ((np.arange(number) + 0.5) * IMAGE_SIZE / number for number in grid)
    left, top, right, bottom = box
    inside = ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))[None, :]
    return torch.from_numpy(inside.ravel())
