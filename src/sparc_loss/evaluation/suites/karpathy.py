"""Retrieval and K-Precision on Karpathy's test splits: `coco`, 5,000 images, and `flickr30k`, 1,000.

    coco/dataset_coco.json
    coco/val2014/*.jpg
    flickr30k/dataset_flickr30k.json
    flickr30k/flickr30k-images/*.jpg

The JSON files from Andrej Karpathy's page "Deep Visual-Semantic Alignments", "caption_datasets.zip"; COCO's images
from the COCO page, "2014 Val images"; Flickr30k's from the Flickr30k page of the University of Illinois.

    sparc-loss evaluate --suite coco,flickr30k --data-root DATA --model ViT-B-16 --pretrained openai
"""

from collections.abc import Mapping
from functools import partial

from sparc_loss.evaluation.dataset import EvaluationData
from sparc_loss.evaluation.suites.json_files import fields_of, read_json
from sparc_loss.evaluation.suites.suite import DataFolder, Suite

# Some images have six or seven; all published figures use five.
CAPTIONS = 5


def _read(listing: str, images: str, folder: DataFolder) -> Mapping[str, EvaluationData]:
    path, root = folder.find(listing), folder.find(images)
    with fields_of(path, "images[] with filename, split and sentences[].raw"):
        rows = [
            # COCO's names a folder; Flickr30k's has none.
            (root / row.get("filepath", "") / row["filename"], [each["raw"] for each in row["sentences"]])
            for row in read_json(path)["images"]
            if row["split"] == "test"
        ]
    data = EvaluationData([])
    empty = 0
    for image, captions in folder.existing(rows, lambda row: row[:1], path):
        captions = [text for text in captions if text.strip()][:CAPTIONS]
        if not captions:
            empty += 1
            continue
        index = data.add_image(image)
        for caption in captions:
            data.add_caption(index, caption)
    if empty:
        data.notes.append(f"left out: {empty} without a caption")
    return {"": data}


PROTOCOL = "no prompt, the first 5 captions of an image, the model's own preprocessing"
COCO = Suite(
    "coco",
    "retrieval and K-Precision, COCO, Karpathy's test split",
    ("coco/dataset_coco.json", "coco/val2014/*.jpg"),
    partial(_read, "coco/dataset_coco.json", "coco"),
    families=("retrieval", "faithfulness"),
    protocol=PROTOCOL,
)
FLICKR30K = Suite(
    "flickr30k",
    "retrieval and K-Precision, Flickr30k, Karpathy's test split",
    ("flickr30k/dataset_flickr30k.json", "flickr30k/flickr30k-images/*.jpg"),
    partial(_read, "flickr30k/dataset_flickr30k.json", "flickr30k/flickr30k-images"),
    families=("retrieval", "faithfulness"),
    protocol=PROTOCOL,
)
