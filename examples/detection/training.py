"""Training of the detection heads, on a frozen backbone or with its image tower."""

from collections.abc import Sequence

import torch

from ..downstream.backbone import Backbone
from ..downstream.embedded_batches import embedded_batches
from ..downstream.optimisation import Optimisation, training_order
from .heads import DetectionHeads
from .loss import Targets, detection_loss
from .objects import DetectionData, Objects, as_tensors

# In a step, the names of the batch and others drawn at random, as OWL-ViT draws negative names.
NAMES_PER_STEP = 256
# Of the image tower where it is trained, in shares of the heads' learning rate.
TOWER_RATE = 0.1


def train_heads(
    backbone: Backbone,
    data: DetectionData,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    workers: int,
    fine_tune: bool = False,
) -> DetectionHeads:
    """Train heads on the data; with `fine_tune` also the backbone's image tower, in place.

    The tower stays in evaluation mode, without dropout. The embeddings of the names stay as they are.
    """
    torch.manual_seed(seed)
    heads = DetectionHeads(backbone.width, backbone.grid).to(backbone.device)
    modules = {heads: lr}
    if fine_tune:
        modules[backbone.model.visual.requires_grad_(True)] = TOWER_RATE * lr
    optimisation = Optimisation(modules, steps)
    embeddings = dict(zip(data.names, backbone.names(data.names), strict=True))
    generator = torch.Generator().manual_seed(seed)
    order = training_order(len(data.images), steps, batch_size, seed)
    for batch in embedded_batches(backbone, data.images, order, batch_size, workers, frozen=not fine_tune):
        objects = [data.objects[index] for index in batch.indices]
        chosen = _names_of_step(objects, data.names, generator)
        targets = [
            _targets(named, size, chosen, backbone.device) for named, size in zip(objects, batch.sizes, strict=True)
        ]
        names = torch.stack([embeddings[name] for name in chosen])
        logits, boxes = heads(batch.patches, names)
        optimisation.step(detection_loss(logits, boxes, targets))
    return heads.eval()


def _names_of_step(objects: Sequence[Objects], names: Sequence[str], generator: torch.Generator) -> list[str]:
    """The names of the objects, and of the others as many as there is room for."""
    own = {name for named in objects for name, _ in named}
    others = [name for name in names if name not in own]
    drawn = torch.randperm(len(others), generator=generator)[: max(0, NAMES_PER_STEP - len(own))].tolist()
    return sorted({*own, *(others[index] for index in drawn)})


def _targets(objects: Objects, size: tuple[int, int], names: Sequence[str], device: torch.device) -> Targets:
    """The objects of an image of `size` (height and width in pixels), their names as places in `names`."""
    height, width = size
    boxes, numbers = as_tensors(objects, names)
    shares = (boxes / torch.tensor([width, height, width, height])).clamp(0, 1)
    return Targets(shares.to(device), numbers.to(device))
