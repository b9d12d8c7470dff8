"""Scenes that are easy to learn: one coloured square each, with a caption and a box; and a model for them."""

import csv
import json
from pathlib import Path

from PIL import Image

from examples.scenes.model import write_model

# Colour -> its value, and the corner of its square of 24 pixels.
SQUARES = {
    "red": ((230, 30, 30), (2, 4)),
    "green": ((30, 180, 60), (36, 8)),
    "blue": ((40, 60, 230), (20, 38)),
    "yellow": ((240, 230, 40), (4, 36)),
    "white": ((250, 250, 250), (38, 36)),
    "purple": ((160, 40, 200), (18, 2)),
}
SIDE = 24


def caption(colour: str) -> str:
    left, top = SQUARES[colour][1]
    return f"a {colour} square stands {left} pixels from the left and {top} from the top"


def write_scenes(folder: Path, colours: tuple[str, ...] = tuple(SQUARES), without_boxes: tuple[str, ...] = ()) -> Path:
    """A CSV as `sparc-loss evaluate` reads it, with a row per colour; a column that the examples do not need too."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pairs.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["filepath", "title", "boxes", "mask"])
        for colour in colours:
            value, (left, top) = SQUARES[colour]
            image = Image.new("RGB", (64, 64), (90, 90, 90))
            image.paste(value, (left, top, left + SIDE, top + SIDE))
            image.save(folder / f"{colour}.png")
            box = [{"phrase": f"a {colour} square", "box": [left, top, left + SIDE, top + SIDE], "words": [1, 2]}]
            boxes = "" if colour in without_boxes else json.dumps(box)
            writer.writerow([folder / f"{colour}.png", caption(colour), boxes, ""])
    return path


def write_untrained(folder: Path) -> str:
    """The value of `--model` for an untrained model with open_clip's own tokenizer."""
    return f"local-dir:{write_model(folder, [], pooling='last', width=64, vision_layers=2)}"
