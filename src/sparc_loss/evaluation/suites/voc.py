"""PASCAL VOC 2012, segmentation, val: 1,449 images, 20 classes; `voc21` counts background, `voc20` leaves it out.

    VOCdevkit/VOC2012/JPEGImages/*.jpg
    VOCdevkit/VOC2012/SegmentationClass/*.png          0 background, 1 to 20, 255 border
    VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt

From the PASCAL VOC page of the University of Oxford, "VOC2012 training/validation data".

    sparc-loss evaluate --suite voc20,voc21 --data-root DATA --model ViT-B-16 --pretrained openai
"""

from collections.abc import Mapping
from functools import partial

from sparc_loss.evaluation.dataset import EvaluationData, MaskCoding, read_lines
from sparc_loss.evaluation.suites.presets import presets
from sparc_loss.evaluation.suites.suite import DataFolder, Suite, class_names, segmentation_data

LAYOUT = tuple(
    f"VOCdevkit/VOC2012/{path}"
    for path in ("JPEGImages/*.jpg", "SegmentationClass/*.png", "ImageSets/Segmentation/val.txt")
)
CLASSES, SYNONYMS = class_names("voc"), class_names("voc-synonyms")


def _read(coding: MaskCoding, folder: DataFolder) -> Mapping[str, EvaluationData]:
    root = folder.find("VOCdevkit/VOC2012")
    split = folder.find("VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt")
    rows = [
        (root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClass" / f"{name}.png") for name in read_lines(split)
    ]
    return segmentation_data(folder, rows, split, CLASSES, coding)


VOC20 = Suite(
    "voc20",
    "segmentation, PASCAL VOC 2012 val, 20 classes",
    LAYOUT,
    partial(_read, MaskCoding(background=False, ignored=(0, 255))),
    protocols=presets(CLASSES, SYNONYMS),
)
VOC21 = Suite(
    "voc21",
    "segmentation, PASCAL VOC 2012 val, 20 classes and background",
    LAYOUT,
    partial(_read, MaskCoding()),
    protocols=presets(
        CLASSES,
        SYNONYMS,
        background=(("background",),),
        sclip_background=class_names("background"),
        clear_threshold=0.5,
        sclip_scale=65.0,
        sclip_area=0.1,
    ),
)
