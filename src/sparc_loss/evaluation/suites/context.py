"""PASCAL Context, val: 5,104 images, 59 classes; `context60` counts background, `context59` leaves it out.

    VOCdevkit/VOC2010/JPEGImages/*.jpg
    VOCdevkit/VOC2010/SegmentationClassContext/*.png          0 background, 1 to 59
    VOCdevkit/VOC2010/ImageSets/SegmentationContext/val.txt

Images from the PASCAL VOC page of the University of Oxford, "VOC2010"; masks as mmsegmentation's
`tools/dataset_converters/pascal_context.py` writes them from the annotations of the PASCAL-Context page.

    sparc-loss evaluate --suite context59,context60 --data-root DATA --model ViT-B-16 --pretrained openai
"""

from collections.abc import Mapping
from functools import partial

from sparc_loss.evaluation.dataset import EvaluationData, MaskCoding, read_lines
from sparc_loss.evaluation.suites.presets import presets
from sparc_loss.evaluation.suites.suite import DataFolder, Suite, class_names, segmentation_data

LAYOUT = tuple(
    f"VOCdevkit/VOC2010/{path}"
    for path in ("JPEGImages/*.jpg", "SegmentationClassContext/*.png", "ImageSets/SegmentationContext/val.txt")
)
CLASSES = class_names("context")


def _read(coding: MaskCoding, folder: DataFolder) -> Mapping[str, EvaluationData]:
    root = folder.find("VOCdevkit/VOC2010")
    split = folder.find("VOCdevkit/VOC2010/ImageSets/SegmentationContext/val.txt")
    rows = [
        (root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClassContext" / f"{name}.png")
        for name in read_lines(split)
    ]
    return segmentation_data(folder, rows, split, CLASSES, coding)


CONTEXT59 = Suite(
    "context59",
    "segmentation, PASCAL Context val, 59 classes",
    LAYOUT,
    partial(_read, MaskCoding(background=False, ignored=(0, 255))),
    protocols=presets(CLASSES),
)
CONTEXT60 = Suite(
    "context60",
    "segmentation, PASCAL Context val, 59 classes and background",
    LAYOUT,
    partial(_read, MaskCoding()),
    protocols=presets(CLASSES, background=(("background",),), clear_threshold=0.15, sclip_scale=50.0),
)
