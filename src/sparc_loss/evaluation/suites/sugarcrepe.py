"""SugarCrepe: 7,512 captions of COCO's val2017, each against one wrong caption, in seven subsets.

    sugar-crepe/data/{add_att,add_obj,replace_att,replace_obj,replace_rel,swap_att,swap_obj}.json
    coco/val2017/*.jpg

The JSON files from the repository RAIVNLab/sugar-crepe; the images from the COCO page, "2017 Val images".

    sparc-loss evaluate --suite sugarcrepe --data-root DATA --model ViT-B-16 --pretrained openai
"""

from collections.abc import Mapping
from pathlib import Path

from sparc_loss.evaluation.dataset import EvaluationData
from sparc_loss.evaluation.suites.json_files import fields_of, read_json
from sparc_loss.evaluation.suites.suite import DataFolder, Suite

SUBSETS = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


def _read(folder: DataFolder) -> Mapping[str, EvaluationData]:
    images = folder.find("coco/val2017", "coco_stuff164k/images/val2017")
    return {subset: _read_subset(folder, subset, images) for subset in SUBSETS}


def _read_subset(folder: DataFolder, subset: str, images: Path) -> EvaluationData:
    path = folder.find(f"sugar-crepe/data/{subset}.json", f"sugarcrepe/data/{subset}.json")
    with fields_of(path, "rows with filename, caption and negative_caption"):
        rows = [
            (images / row["filename"], row["caption"], row["negative_caption"]) for row in read_json(path).values()
        ]
    data = EvaluationData([])
    known: dict[str, int] = {}
    for image, caption, negative in folder.existing(rows, lambda row: row[:1], path):
        if image.name not in known:
            known[image.name] = data.add_image(image)
        data.add_caption(known[image.name], caption, hard_negative=negative)
    return data


SUGARCREPE = Suite(
    "sugarcrepe",
    "composition, SugarCrepe, seven subsets",
    (
        "sugar-crepe/data/{add_att,add_obj,replace_att,replace_obj,replace_rel,swap_att,swap_obj}.json",
        "coco/val2017/*.jpg",
    ),
    _read,
    families=("hard_negatives",),
    protocol="the right caption against one wrong one, no prompt, a tie is a miss",
)
