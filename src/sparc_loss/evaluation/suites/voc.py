"""PASCAL VOC 2012, segmentation, val: 1,449 images, 20 classes; `voc21` counts background, `voc20` leaves it out.

    VOCdevkit/VOC2012/JPEGImages/*.jpg
    VOCdevkit/VOC2012/SegmentationClass/*.png          0 background, 1 to 20, 255 border
    VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt

From the PASCAL VOC page of the University of Oxford, "VOC2012 training/validation data".

    sparc-loss evaluate --suite voc20,voc21 --data-root DATA --model ViT-B-16 --pretrained openai
"""

from functools import partial

from sparc_loss.evaluation.suites.presets import presets
from sparc_loss.evaluation.suites.suite import class_names
from sparc_loss.evaluation.suites.voc_devkit import devkit_suite

CLASSES, SYNONYMS = class_names("voc"), class_names("voc-synonyms")

_suite = partial(devkit_suite, year="VOC2012", masks="SegmentationClass", lists="Segmentation", classes=CLASSES)

VOC20 = _suite(
    "voc20",
    "segmentation, PASCAL VOC 2012 val, 20 classes",
    protocols=presets(CLASSES, SYNONYMS),
    background=False,
)
VOC21 = _suite(
    "voc21",
    "segmentation, PASCAL VOC 2012 val, 20 classes and background",
    protocols=presets(
        CLASSES,
        SYNONYMS,
        background=(("background",),),
        sclip_background=class_names("background"),
        clear_threshold=0.5,
        sclip_scale=65.0,
        sclip_area=0.1,
    ),
    background=True,
)
