"""PASCAL Context, val: 5,104 images, 59 classes; `context60` counts background, `context59` leaves it out.

    VOCdevkit/VOC2010/JPEGImages/*.jpg
    VOCdevkit/VOC2010/SegmentationClassContext/*.png          0 background, 1 to 59
    VOCdevkit/VOC2010/ImageSets/SegmentationContext/val.txt

Images from the PASCAL VOC page of the University of Oxford, "VOC2010"; masks as mmsegmentation's
`tools/dataset_converters/pascal_context.py` writes them from the annotations of the PASCAL-Context page.

    sparc-loss evaluate --suite context59,context60 --data-root DATA --model ViT-B-16 --pretrained openai
"""

from functools import partial

from sparc_loss.evaluation.suites.presets import presets
from sparc_loss.evaluation.suites.suite import class_names
from sparc_loss.evaluation.suites.voc_devkit import devkit_suite

CLASSES = class_names("context")

_suite = partial(
    devkit_suite, year="VOC2010", masks="SegmentationClassContext", lists="SegmentationContext", classes=CLASSES
)

CONTEXT59 = _suite(
    "context59", "segmentation, PASCAL Context val, 59 classes", protocols=presets(CLASSES), background=False
)
CONTEXT60 = _suite(
    "context60",
    "segmentation, PASCAL Context val, 59 classes and background",
    protocols=presets(CLASSES, background=(("background",),), clear_threshold=0.15, sclip_scale=50.0),
    background=True,
)
