"""ADE20K, validation of the scene parsing benchmark: 2,000 images, 150 classes.

    ADEChallengeData2016/images/validation/*.jpg
    ADEChallengeData2016/annotations/validation/*.png    0 ignored, 1 to 150

From the MIT Scene Parsing Benchmark page, "ADEChallengeData2016".

    sparc-loss evaluate --suite ade20k --data-root DATA --model ViT-B-16 --pretrained openai
"""

from collections.abc import Mapping

from sparc_loss.evaluation.dataset import EvaluationData, MaskCoding
from sparc_loss.evaluation.suites.presets import presets
from sparc_loss.evaluation.suites.suite import DataFolder, Suite, class_names, segmentation_data

CLASSES = class_names("ade20k")
IMAGES, MASKS = "ADEChallengeData2016/images/validation", "ADEChallengeData2016/annotations/validation"


def _read(folder: DataFolder) -> Mapping[str, EvaluationData]:
    images, masks = folder.find(IMAGES), folder.find(MASKS)
    rows = [(image, masks / f"{image.stem}.png") for image in sorted(images.glob("*.jpg"))]
    return segmentation_data(folder, rows, images, CLASSES, MaskCoding(background=False, ignored=(0,)))


ADE20K = Suite(
    "ade20k",
    "segmentation, ADE20K validation, 150 classes",
    (f"{IMAGES}/*.jpg", f"{MASKS}/*.png"),
    _read,
    protocols=presets(CLASSES),
)
