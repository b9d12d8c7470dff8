"""A held-out split as `sparc-loss evaluate` reads it: boxes, words, masks and swapped captions beside the captions.

folder/
  SPLIT-evaluate.csv      filepath, title, boxes, mask, hard_negative
  classes.txt             the phrases "a red zero" to "a white cross", one per line: the classes of the masks
  masks/SPLIT/NNNNN.png   0 is background, i line i of the classes
"""

import csv
import json
from itertools import combinations, product
from pathlib import Path

import numpy as np
from PIL import Image

from sparc_loss.evaluation import swap_words

from .captions import phrase
from .dataset import Annotations, read_annotations
from .folders import drafted
from .scenes import COLOURS, KINDS, Split

CLASSES = [phrase(colour, kind) for colour, kind in product(COLOURS, KINDS)]


def write_evaluation_csv(data: str | Path, split: Split) -> Path:
    """Write it beside the data set, from its annotations; returns the CSV, absolute.

    Raises:
        FileNotFoundError: the split has no annotations.
        FileExistsError: its masks are there.
    """
    data = Path(data).resolve()
    scenes = read_annotations(data, split)
    masks = data / "masks" / split
    masks.parent.mkdir(exist_ok=True)
    with drafted(masks) as draft:
        for index, (labels, objects) in enumerate(zip(scenes.labels, scenes.objects, strict=True)):
            numbers = np.array([0, *(CLASSES.index(each.phrase) + 1 for each in objects)], np.uint8)
            Image.fromarray(numbers[labels]).save(draft / f"{index:05d}.png")
    (data / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES), encoding="utf-8")
    swapped = swapped_captions(scenes)
    path = data / f"{split}-evaluate.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["filepath", "title", "boxes", "mask", "hard_negative"])
        for index, (image, caption, objects) in enumerate(
            zip(scenes.images, scenes.captions, scenes.objects, strict=True)
        ):
            boxes = [
                {"phrase": each.phrase, "box": each.box, "words": sorted(each.words.values())} for each in objects
            ]
            writer.writerow([image, caption, json.dumps(boxes), masks / f"{index:05d}.png", swapped.get(index, "")])
    return path


def swapped_captions(scenes: Annotations) -> dict[int, str]:
    """Scene -> its caption with the colours of two objects exchanged, where it tells two colours of two kinds."""
    swapped = {}
    for index, (caption, objects) in enumerate(zip(scenes.captions, scenes.objects, strict=True)):
        told = [each for each in objects if "colour" in each.words]
        for one, other in combinations(told, 2):
            if one.colour != other.colour and one.kind != other.kind:
                swapped[index] = swap_words(caption, one.words["colour"], other.words["colour"])
                break
    return swapped
