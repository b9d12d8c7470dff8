"""Other ways to make SPARC's alignment look at its image than those the library offers, small enough to try."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.tv_tensors import BoundingBoxes

from sparc_loss import SparcLoss
from sparc_loss.functional import (
    alignment_weights,
    language_grouped_embeddings,
    sequence_contrastive_loss,
    token_patch_similarity,
)
from sparc_loss.losses.outputs import ModelOutputs
from sparc_loss.regions import region_mask

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

    As `--sparc-regions boxes` makes it of a CSV with the boxes of the scenes; their images are not cropped. For the
    tokenizer whose token i is word i.
    """
    masks = []
    for index in range(count):
        objects = generate_scene(world, "train", index).objects
        named = [(box, sorted(each.words.values())) for each in objects for box in each.boxes]
        boxes = BoundingBoxes(
            [box for box, _ in named], format="XYXY", canvas_size=(IMAGE_SIZE, IMAGE_SIZE), dtype=torch.float64
        )
        masks.append(region_mask(boxes, [words for _, words in named], grid, length))
    return torch.stack(masks)
