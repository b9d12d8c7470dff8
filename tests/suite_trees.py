"""Made data sets in the layouts of the published ones, two or three images each, with the quirks of the real files."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

# Height and width; none is square, one is smaller than a window.
SIZES = ((48, 64), (40, 24), (20, 33))
NAMES = ("2007_000033", "2007_000042", "2007_000061")


def picture(path: Path, size: tuple[int, int], mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def mask(path: Path, size: tuple[int, int], values: tuple[int, ...], palette: bool = False) -> None:
    """Bands of the values, from left to right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = np.array(values, np.uint8)[np.arange(size[1]) * len(values) // size[1]]
    drawn = Image.fromarray(np.broadcast_to(bands, size).copy())
    if palette:
        drawn.putpalette([0] * 768)
    drawn.save(path)


def voc(root: Path) -> None:
    base = root / "VOCdevkit" / "VOC2012"
    for name, size in zip(NAMES, SIZES, strict=True):
        picture(base / "JPEGImages" / f"{name}.jpg", size)
        mask(base / "SegmentationClass" / f"{name}.png", size, (0, 1, 255, 20), palette=True)  # 255 on borders
    write(base / "ImageSets" / "Segmentation" / "val.txt", "\n".join(NAMES) + "\n")


def context(root: Path) -> None:
    base = root / "VOCdevkit" / "VOC2010"
    for name, size in zip(NAMES, SIZES, strict=True):
        picture(base / "JPEGImages" / f"{name}.jpg", size)
        mask(base / "SegmentationClassContext" / f"{name}.png", size, (0, 1, 59))
    write(base / "ImageSets" / "SegmentationContext" / "val.txt", "\n".join(NAMES))


def coco_stuff(root: Path) -> None:
    base = root / "coco_stuff164k"
    for number, size in enumerate(SIZES):
        name = f"{number:012d}"
        # COCO has grey images, and one of CMYK.
        picture(base / "images" / "val2017" / f"{name}.jpg", size, ("RGB", "L", "CMYK")[number])
        mask(base / "annotations" / "val2017" / f"{name}_labelTrainIds.png", size, (0, 170, 255))
        mask(base / "annotations" / "val2017" / f"{name}_instanceTrainIds.png", size, (0, 1, 80))


def cityscapes(root: Path) -> None:
    for city, size in zip(("frankfurt", "munster"), SIZES, strict=False):
        name = f"{city}_000000_000294"
        picture(root / "cityscapes/leftImg8bit/val" / city / f"{name}_leftImg8bit.png", size)
        mask(root / "cityscapes/gtFine/val" / city / f"{name}_gtFine_labelTrainIds.png", size, (0, 18, 255))


def ade20k(root: Path) -> None:
    base = root / "ADEChallengeData2016"
    for number, size in enumerate(SIZES):
        name = f"ADE_val_{number:08d}"
        picture(base / "images" / "validation" / f"{name}.jpg", size)
        mask(base / "annotations" / "validation" / f"{name}.png", size, (0, 1, 150))  # 0 is ignored


def karpathy(root: Path) -> None:
    for name, folder in (("coco", "val2014"), ("flickr30k", "flickr30k-images")):
        images = []
        for number in range(12):
            file = f"{number}.jpg"
            picture(root / name / folder / file, SIZES[number % 3], "L" if number == 1 else "RGB")
            captions = [f"scene {number} of {name}, caption {each}" for each in range(6 if number == 0 else 5)]
            row = {"filename": file, "split": "test", "sentences": [{"raw": text} for text in captions]}
            images.append({**row, "filepath": folder} if name == "coco" else row)
        images[2]["sentences"] = []  # one image without a caption
        images.append({**images[0], "split": "restval", "filename": "train.jpg"})
        write(root / name / f"dataset_{name}.json", json.dumps({"images": images}))


def sugarcrepe(root: Path) -> None:
    for number in range(3):
        picture(root / "coco" / "val2017" / f"{number:012d}.jpg", SIZES[number], ("RGB", "L", "CMYK")[number])
    for subset in ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj"):
        rows = {
            # The numbers of the rows have gaps, and an image may have several rows.
            str(3 * index): {
                "filename": f"{index % 3:012d}.jpg",
                "caption": f"a {subset} scene {index}",
                "negative_caption": f"a wrong {subset} scene {index}",
            }
            for index in range(4)
        }
        write(root / "sugar-crepe" / "data" / f"{subset}.json", json.dumps(rows))


def aro(root: Path) -> None:
    picture(root / "aro" / "images" / "1.jpg", SIZES[0])
    row = {"image_path": "1.jpg", "bbox_x": 5, "bbox_y": 3, "bbox_w": 20, "bbox_h": 30}
    relations, attributions = [], []
    for index, relation in enumerate(("on", "on", "behind")):
        captions = {
            "true_caption": f"the cat {relation} mat {index}",
            "false_caption": f"the mat {relation} cat {index}",
        }
        relations.append({**row, **captions, "relation_name": relation})
    for index in range(26):
        attributes = ["white", "long"] if index else ["rare", "pair"]
        captions = {"true_caption": f"the white cat {index}", "false_caption": f"the long cat {index}"}
        attributions.append({**row, **captions, "attributes": attributes})
    write(root / "aro" / "visual_genome_relation.json", json.dumps(relations))
    write(root / "aro" / "visual_genome_attribution.json", json.dumps(attributions))


def imagenet(root: Path) -> None:
    for number in range(1000):
        (root / "imagenet" / "val" / f"n{number:08d}").mkdir(parents=True)
    for number in (0, 1, 999):
        folder = root / "imagenet" / "val" / f"n{number:08d}"
        picture(folder / "ILSVRC2012_val_1.JPEG", SIZES[number % 3], "CMYK" if number == 999 else "RGB")


def flickr30k_entities(root: Path) -> None:
    base = root / "flickr30k_entities"
    sentences = (
        "[/EN#1/people A man] rides [/EN#2/vehicles/other a red bike] in [/EN#3/scene the street] .",
        "[/EN#0/notvisual It] is [/EN#1/people him] .",
    )
    boxes = {"1": (3, 5, 20, 30), "2": (10, 10, 24, 40)}
    objects = "".join(
        f"<object><name>{chain}</name><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax>"
        f"<ymax>{box[3]}</ymax></bndbox></object>"
        for chain, box in boxes.items()
    )
    scene = "<object><name>3</name><scene>1</scene><nobndbox>0</nobndbox></object>"
    for name in ("1016887272", "10287332"):
        picture(root / "flickr30k" / "flickr30k-images" / f"{name}.jpg", SIZES[0])
        write(base / "Sentences" / f"{name}.txt", "\n".join(sentences) + "\n")
        write(base / "Annotations" / f"{name}.xml", f"<annotation>{objects}{scene}</annotation>")
    write(base / "test.txt", "1016887272\n10287332\n")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


TREES: dict[str, Callable[[Path], None]] = {
    "voc20": voc,
    "voc21": voc,
    "context59": context,
    "context60": context,
    "coco-stuff": coco_stuff,
    "coco-object": coco_stuff,
    "cityscapes": cityscapes,
    "ade20k": ade20k,
    "coco": karpathy,
    "flickr30k": karpathy,
    "sugarcrepe": sugarcrepe,
    "aro": aro,
    "imagenet": imagenet,
    "flickr30k-entities": flickr30k_entities,
}
