"""A held-out split as `sparc-loss evaluate` reads it: boxes, words, masks and hard negatives beside the captions.

folder/
  SPLIT-evaluate.csv      filepath, title, boxes, mask, hard_negative
  classes.txt             the phrases of the world, such as "a red zero", one per line: the classes of the masks
  masks/SPLIT/NNNNN.png   0 is background, i line i of the classes
"""

import csv
import json
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sparc_loss.evaluation import swap_words

from .captions import article
from .dataset import Annotations, read_annotations, read_world
from .folders import drafted
from .scene import SceneObject
from .world import Split
from .worlds import WORLDS


def write_evaluation_csv(data: str | Path, split: Split) -> Path:
    """Write it beside the data set, from its annotations; returns the CSV, absolute.

    Raises:
        FileNotFoundError: the split has no annotations.
        FileExistsError: its masks are there.
    """
    data = Path(data).resolve()
    classes = WORLDS[read_world(data)].phrases()
    scenes = read_annotations(data, split)
    masks = data / "masks" / split
    masks.parent.mkdir(exist_ok=True)
    with drafted(masks) as draft:
        for index, (labels, objects) in enumerate(zip(scenes.labels, scenes.objects, strict=True)):
            numbers = np.array([0, *(classes.index(each.phrase) + 1 for each in objects)], np.uint8)
            Image.fromarray(numbers[labels]).save(draft / f"{index:05d}.png")
    (data / "classes.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
    swapped = swapped_captions(scenes)
    path = data / f"{split}-evaluate.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["filepath", "title", "boxes", "mask", "hard_negative"])
        for index, (image, caption, objects) in enumerate(
            zip(scenes.images, scenes.captions, scenes.objects, strict=True)
        ):
            boxes = json.dumps(named_boxes(objects))
            writer.writerow([image, caption, boxes, masks / f"{index:05d}.png", swapped.get(index, "")])
    return path


def named_boxes(objects: Iterable[SceneObject]) -> list[dict[str, Any]]:
    """The column `boxes` of a scene, before it is JSON."""
    return [
        {"phrase": each.phrase, "box": box, "words": sorted(each.words.values())}
        for each in objects
        for box in each.boxes
    ]


def swapped_captions(scenes: Annotations) -> dict[int, str]:
    """Scene -> its caption with two words exchanged, so that it is false; scenes whose caption allows it.

    The words are the colours of two objects of different kind, or the nouns of objects of different number.
    """
    swapped = {}
    for index, (caption, objects) in enumerate(zip(scenes.captions, scenes.objects, strict=True)):
        for one, other in combinations(objects, 2):
            if {"colour"} <= one.words.keys() & other.words.keys():
                if one.colour != other.colour and one.kind != other.kind:
                    swapped[index] = swap_words(caption, one.words["colour"], other.words["colour"])
                    break
            elif len(one.boxes) != len(other.boxes):
                swapped[index] = _with_kind_of(other, one, _with_kind_of(one, other, caption))
                break
    return swapped


def _with_kind_of(other: SceneObject, one: SceneObject, caption: str) -> str:
    """`caption` with the noun of `one` replaced by that of `other`, in the number of `one`."""
    words, place = caption.split(), one.words["kind"]
    comma = "," if words[place].endswith(",") else ""
    words[place] = (other.kind if len(one.boxes) == 1 else other.plural) + comma
    if words[place - 1] in ("a", "an"):
        words[place - 1] = article(words[place])
    return " ".join(words)
