"""COCO val2017, 5,000 images: `coco-stuff` has 171 classes, `coco-object` 80 of them and background.

    coco_stuff164k/images/val2017/*.jpg
    coco_stuff164k/annotations/val2017/*_labelTrainIds.png       0 to 170, 255 ignored
    coco_stuff164k/annotations/val2017/*_instanceTrainIds.png    0 background, 1 to 80 (coco-object)

Images from the COCO page, "2017 Val images"; masks from the COCO-Stuff page, "stuffthingmaps_trainval2017", which
mmsegmentation's `tools/dataset_converters/coco_stuff164k.py` and, for coco-object, GroupViT's
`convert_dataset/convert_coco_object.py` convert.

    sparc-loss evaluate --suite coco-stuff,coco-object --data-root DATA --model ViT-B-16 --pretrained openai
"""

from collections.abc import Mapping
from functools import partial

from sparc_loss.evaluation.dataset import EvaluationData, MaskCoding
from sparc_loss.evaluation.suites.presets import presets
from sparc_loss.evaluation.suites.suite import DataFolder, Names, Suite, class_names, segmentation_data

STUFF, OBJECTS = class_names("coco-stuff"), class_names("coco-object")
IMAGES, MASKS = "coco_stuff164k/images/val2017", "coco_stuff164k/annotations/val2017"


def _read(suffix: str, classes: Names, coding: MaskCoding, folder: DataFolder) -> Mapping[str, EvaluationData]:
    images, masks = folder.find(IMAGES), folder.find(MASKS)
    rows = [(image, masks / f"{image.stem}{suffix}") for image in sorted(images.glob("*.jpg"))]
    return segmentation_data(folder, rows, images, classes, coding)


COCO_STUFF = Suite(
    "coco-stuff",
    "segmentation, COCO-Stuff val2017, 171 classes",
    (f"{IMAGES}/*.jpg", f"{MASKS}/*_labelTrainIds.png"),
    partial(_read, "_labelTrainIds.png", STUFF, MaskCoding(first=0, background=False)),
    protocols=presets(STUFF, sclip_side=448),
)
COCO_OBJECT = Suite(
    "coco-object",
    "segmentation, COCO val2017, 80 classes and background",
    (f"{IMAGES}/*.jpg", f"{MASKS}/*_instanceTrainIds.png"),
    partial(_read, "_instanceTrainIds.png", OBJECTS, MaskCoding()),
    protocols=presets(
        OBJECTS,
        class_names("coco-object-synonyms"),
        background=(("background",),),
        sclip_background=class_names("background"),
        clear_threshold=0.4,
        sclip_scale=50.0,
    ),
)
