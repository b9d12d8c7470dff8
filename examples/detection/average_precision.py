"""Mean average precision over classes, also of those classes that had no box in training."""

import statistics
from collections.abc import Collection

import torch
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from sparc_loss.evaluation.image_batches import image_batches

from ..downstream.backbone import Backbone
from .heads import DetectionHeads
from .objects import DetectionData, as_tensors

# COCO scores the 100 predictions of an image that are most certain.
PREDICTIONS = 100


@torch.no_grad()
def average_precision(
    backbone: Backbone,
    heads: DetectionHeads,
    data: DetectionData,
    trained: Collection[str],
    batch_size: int,
    workers: int,
) -> dict[str, float | int | None]:
    """COCO's mAP of every name of the data, by torchmetrics; IoU 0.5 to 0.95.

    Args:
        backbone: the image tower.
        heads: trained on it.
        data: the test images.
        trained: names with a box in training.
        batch_size: images at a time.
        workers: processes that read images.

    Returns:
        mAP over all names, the same at IoU 0.5, mAP over names with and without a box in training (None where there
        is no such name), and the numbers of images, boxes and names.
    """
    names = data.names
    embeddings = backbone.names(names)
    metric = MeanAveragePrecision(class_metrics=True, backend="faster_coco_eval")
    metric.warn_on_many_detections = False
    for batch in image_batches(backbone.model, data.images, batch_size, workers, own=False):
        assert batch.whole is not None
        logits, boxes = heads(backbone.patches(batch.whole), embeddings)
        for image, index in enumerate(batch.indices):
            pixels = torch.tensor(batch.sizes[image]).flip(0).repeat(2)
            true, numbers = as_tensors(data.objects[index], names)
            target = {"boxes": true, "labels": numbers}
            metric.update([predictions(logits[image].cpu(), boxes[image].cpu() * pixels)], [target])
    result = metric.compute()
    # Of a single class they have no axis.
    numbers, precisions = (result[name].reshape(-1).tolist() for name in ("classes", "map_per_class"))
    of_names = dict(zip(numbers, precisions, strict=True))
    groups: dict[bool, list[float]] = {True: [], False: []}
    for number, name in enumerate(names):
        groups[name in trained].append(of_names[number])
    return {
        "mAP": result["map"].item(),
        "mAP at IoU 0.5": result["map_50"].item(),
        "mAP of names with boxes in training": statistics.fmean(groups[True]) if groups[True] else None,
        "mAP of names without": statistics.fmean(groups[False]) if groups[False] else None,
        "images": len(data.images),
        "boxes": sum(map(len, data.objects)),
        "names": len(names),
        "names without boxes in training": len(groups[False]),
    }


def predictions(logits: Tensor, boxes: Tensor) -> dict[str, Tensor]:
    """The most certain pairs of a patch and a name, as torchmetrics takes them.

    Args:
        logits: [P, C].
        boxes: [P, 4].
    """
    scores, places = logits.sigmoid().flatten().topk(min(PREDICTIONS, logits.numel()))
    return {"scores": scores, "labels": places % logits.shape[1], "boxes": boxes[places // logits.shape[1]]}
