"""The field's benchmarks: where each data set lies on disk, and the protocols of the published figures."""

from sparc_loss.evaluation.suites.ade20k import ADE20K
from sparc_loss.evaluation.suites.aro import ARO
from sparc_loss.evaluation.suites.cityscapes import CITYSCAPES
from sparc_loss.evaluation.suites.coco_stuff import COCO_OBJECT, COCO_STUFF
from sparc_loss.evaluation.suites.context import CONTEXT59, CONTEXT60
from sparc_loss.evaluation.suites.flickr30k_entities import FLICKR30K_ENTITIES
from sparc_loss.evaluation.suites.imagenet import IMAGENET
from sparc_loss.evaluation.suites.karpathy import COCO, FLICKR30K
from sparc_loss.evaluation.suites.sugarcrepe import SUGARCREPE
from sparc_loss.evaluation.suites.suite import DataFolder, Suite
from sparc_loss.evaluation.suites.voc import VOC20, VOC21

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        VOC20,
        VOC21,
        CONTEXT59,
        CONTEXT60,
        COCO_STUFF,
        COCO_OBJECT,
        CITYSCAPES,
        ADE20K,
        COCO,
        FLICKR30K,
        SUGARCREPE,
        ARO,
        IMAGENET,
        FLICKR30K_ENTITIES,
    )
}

__all__ = ["SUITES", "DataFolder", "Suite"]
