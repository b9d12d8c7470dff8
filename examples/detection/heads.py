"""OWL-ViT's heads (Minderer et al., arXiv 2205.06230): each patch predicts one box and one class embedding."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import MLP, box_convert

# As RetinaNet and OWL-ViT begin: nearly every patch is of no class.
_FIRST_PROBABILITY = 0.01
_FIRST_SCALE = 10.0


class DetectionHeads(nn.Module):
    """A box and the logits of C names for each of P patches.

    Args:
        width: D of the patch embeddings and of the embeddings of names.
        grid: height and width of the grid of patches, with P = height * width.
    """

    def __init__(self, width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.class_embedding = nn.Linear(width, width)
        self.logit_shift = nn.Linear(width, 1)
        self.logit_scale = nn.Linear(width, 1)
        self.box = MLP(width, [width, width, 4], activation_layer=nn.GELU, inplace=None)
        self.register_buffer("patch_boxes", patch_boxes(grid))
        # Patches and names begin where the backbone has them: in one space.
        nn.init.eye_(self.class_embedding.weight)
        nn.init.zeros_(self.class_embedding.bias)
        # The first scale and shift are the same for all patches.
        nn.init.zeros_(self.logit_scale.weight)
        nn.init.zeros_(self.logit_shift.weight)
        nn.init.constant_(self.logit_scale.bias, _FIRST_SCALE - 1)
        probability = torch.tensor(_FIRST_PROBABILITY)
        nn.init.constant_(self.logit_shift.bias, probability.logit().item() / _FIRST_SCALE)
        # The first boxes are those of the patches.
        nn.init.zeros_(self.box[-2].weight)
        nn.init.zeros_(self.box[-2].bias)

    def forward(self, patches: Tensor, names: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions of B images.

        Args:
            patches: [B, P, D].
            names: normalised embeddings [C, D].

        Returns:
            Logits [B, P, C] and boxes [B, P, 4]: left, top, right and bottom as shares of the image.
        """
        cosines = F.normalize(self.class_embedding(patches), dim=-1) @ names.T
        patches = self.norm(patches)
        logits = (cosines + self.logit_shift(patches)) * (F.elu(self.logit_scale(patches)) + 1)
        centred = (self.box(patches) + self.patch_boxes.logit()).sigmoid()
        return logits, box_convert(centred, "cxcywh", "xyxy")


def patch_boxes(grid: Sequence[int]) -> Tensor:
    """Centre, width and height of each patch as shares of the image, [P, 4], row by row; within (0, 1)."""
    height, width = grid
    down, across = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    centres = torch.stack([(across + 0.5) / width, (down + 0.5) / height], dim=-1)
    boxes = torch.cat([centres, torch.tensor([1 / width, 1 / height]).expand_as(centres)], dim=-1)
    return boxes.reshape(-1, 4).clamp(0.01, 0.99)  # a grid of one patch covers the image
