"""Cityscapes, val: 500 images, 19 classes.

    cityscapes/leftImg8bit/val/CITY/*_leftImg8bit.png
    cityscapes/gtFine/val/CITY/*_gtFine_labelTrainIds.png    0 to 18, 255 ignored

From the Cityscapes page, "leftImg8bit_trainvaltest" and "gtFine_trainvaltest"; `csCreateTrainIdLabelImgs` of the
package cityscapesscripts writes the masks of train ids. torchvision's reader gives other ids (`labelIds`).

    sparc-loss evaluate --suite cityscapes --data-root DATA --model ViT-B-16 --pretrained openai
"""

from collections.abc import Mapping

from sparc_loss.evaluation.dataset import EvaluationData, MaskCoding
from sparc_loss.evaluation.suites.presets import presets
from sparc_loss.evaluation.suites.suite import DataFolder, Suite, class_names, segmentation_data

CLASSES = class_names("cityscapes")


def _read(folder: DataFolder) -> Mapping[str, EvaluationData]:
    images, masks = folder.find("cityscapes/leftImg8bit/val"), folder.find("cityscapes/gtFine/val")
    suffix = "_leftImg8bit.png"
    rows = [
        (image, masks / image.parent.name / f"{image.name.removesuffix(suffix)}_gtFine_labelTrainIds.png")
        for image in sorted(images.glob(f"*/*{suffix}"))
    ]
    return segmentation_data(folder, rows, images, CLASSES, MaskCoding(first=0, background=False))


CITYSCAPES = Suite(
    "cityscapes",
    "segmentation, Cityscapes val, 19 classes",
    ("cityscapes/leftImg8bit/val/*/*_leftImg8bit.png", "cityscapes/gtFine/val/*/*_gtFine_labelTrainIds.png"),
    _read,
    protocols=presets(CLASSES, window=224, sclip_side=560),
)
