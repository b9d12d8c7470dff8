"""The detection loss: each box is given to one patch, which learns its place and its name (DETR, arXiv 2005.12872).

Coefficients are those of Deformable DETR (arXiv 2010.04159), for the matching and for the loss alike.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou, generalized_box_iou_loss, sigmoid_focal_loss

NAME, DISTANCE, OVERLAP = 2.0, 5.0, 2.0
ALPHA, GAMMA = 0.25, 2.0


class Targets(NamedTuple):
    """The T objects of an image.

    Attributes:
        boxes: [T, 4], left, top, right and bottom as shares of the image.
        names: int64 [T], the name of each.
    """

    boxes: Tensor
    names: Tensor


def detection_loss(logits: Tensor, boxes: Tensor, targets: Sequence[Targets]) -> Tensor:
    """Focal loss of all names in all patches, L1 and generalised IoU of the matched boxes; a scalar.

    Each is a sum over the batch, divided by the number of its objects (at least 1).

    Args:
        logits: [B, P, C].
        boxes: [B, P, 4].
        targets: B of them, with at most P objects each; of the objects of a fuller image, the P that match best.
    """
    named = torch.zeros_like(logits)
    costs = name_costs(logits)
    found, wanted = [], []
    for image, target in enumerate(targets):
        patches, objects = match(costs[image], boxes[image], target)
        named[image, patches, target.names[objects]] = 1
        found.append(boxes[image, patches])
        wanted.append(target.boxes[objects])
    predicted, true = torch.cat(found), torch.cat(wanted)
    names = sigmoid_focal_loss(logits, named, ALPHA, GAMMA, reduction="sum")
    distance = F.l1_loss(predicted, true, reduction="sum")
    overlap = generalized_box_iou_loss(predicted, true, reduction="sum")
    return (NAME * names + DISTANCE * distance + OVERLAP * overlap) / max(1, len(true))


@torch.no_grad()
def name_costs(logits: Tensor) -> Tensor:
    """What the focal loss of each patch and name changes if the name becomes true; as `logits`, of any shape."""
    true, false = (sigmoid_focal_loss(logits, torch.full_like(logits, truth), ALPHA, GAMMA) for truth in (1.0, 0.0))
    return NAME * (true - false)


@torch.no_grad()
def match(costs_of_names: Tensor, boxes: Tensor, target: Targets) -> tuple[Tensor, Tensor]:
    """The patch of each object, so that the sum of their costs is least: int64 [T] and int64 [T].

    Args:
        costs_of_names: [P, C], `name_costs` of the logits.
        boxes: [P, 4].
        target: T objects.

    Raises:
        ValueError: predictions that are not finite.
    """
    costs = costs_of_names[:, target.names] + DISTANCE * torch.cdist(boxes, target.boxes, p=1)
    costs = costs - OVERLAP * generalized_box_iou(boxes, target.boxes)
    if not costs.isfinite().all():
        raise ValueError("the predictions of boxes and names are not finite; expected finite numbers: a smaller --lr")
    patches, objects = linear_sum_assignment(costs.cpu().numpy())
    return torch.as_tensor(patches, device=boxes.device), torch.as_tensor(objects, device=boxes.device)
