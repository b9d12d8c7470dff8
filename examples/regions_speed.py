"""What boxes cost open_clip's loader: `--sparc-regions boxes` on a CSV, beside the same loader without it.

Two kinds of images: the study's scenes, 64 x 64 pixels, which are read in a millisecond, and made photographs of
500 x 375. In each, all rows have boxes, or one in a hundred. One process, no workers. `make bench` runs it.
"""

import csv
import json
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
from open_clip.transform import image_transform
from open_clip_train.data import get_data
from open_clip_train.params import parse_args

from sparc_loss.regions.behind_texts import RegionSizes
from sparc_loss.regions.training_data import data_with_regions

from .scenes.dataset import read_annotations, write_dataset
from .scenes.evaluation_csv import named_boxes
from .segmentation_speed import HEIGHT, WIDTH, photograph

Row = tuple[Path, str, list[dict[str, Any]]]


def scenes(folder: Path, pairs: int) -> list[Row]:
    """Scenes of digits, with the boxes of all their objects."""
    found = read_annotations(write_dataset(folder / "scenes", {"val": pairs}, workers=1), "val")
    return [
        (image, caption, named_boxes(objects))
        for image, caption, objects in zip(found.images, found.captions, found.objects, strict=True)
    ]


def photographs(folder: Path, pairs: int) -> list[Row]:
    """JPEGs of smooth noise with a box each."""
    generator = np.random.default_rng(0)
    rows = []
    for index in range(pairs):
        path = folder / f"{index}.jpg"
        photograph(generator).save(path, quality=95)
        box = {"phrase": "a dog", "box": [50, 50, 250, 300], "words": [0, 1]}
        rows.append((path, f"a dog on a red sofa in room {index}", [box]))
    return rows


def regions_speed(pairs: int = 200, rounds: int = 8) -> list[dict[str, Any]]:
    """Milliseconds a pair without boxes, and how many times as long it takes with them, with quartiles."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name, make, size, grid in (
            ("scenes of 64 x 64", scenes, 64, (8, 8)),
            (f"photographs of {WIDTH} x {HEIGHT}", photographs, 224, (14, 14)),
        ):
            rows = make(Path(folder), pairs)
            for share in (1, 100):
                path = write_csv(Path(folder) / f"{share}.csv", rows, every=share)
                plain, boxed = loaders(path, size, grid)
                seconds = [(spent(plain), spent(boxed)) for _ in range(rounds + 1)][1:]  # the first warms up
                results.append(
                    {
                        "images": name,
                        "boxes": "all rows" if share == 1 else "1 % of the rows",
                        "pairs": pairs,
                        "milliseconds": 1000 * statistics.median(without for without, _ in seconds) / pairs,
                        "times": statistics.quantiles([boxes / without for without, boxes in seconds], n=4),
                    }
                )
    return results


def write_csv(path: Path, rows: list[Row], every: int) -> Path:
    """The rows as a CSV, every so many of them with boxes."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["filepath", "title", "boxes"])
        for index, (image, caption, boxes) in enumerate(rows):
            writer.writerow([image, caption, "" if index % every else json.dumps(boxes)])
    return path


def loaders(path: Path, size: int, grid: tuple[int, int]) -> tuple[Iterable[Any], Iterable[Any]]:
    """open_clip's loader of a CSV without and with boxes."""
    args = parse_args(["--train-data", str(path), "--batch-size", "20", "--workers", "0"])
    args.distributed, args.world_size, args.rank = False, 1, 0
    transform = image_transform(size, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-16")
    given = args, (transform, transform)
    plain = get_data(*given, tokenizer=tokenizer, epoch=0)
    sizes = RegionSizes(77, 77, grid)
    boxed = data_with_regions(get_data, *given, tokenizer=tokenizer, epoch=0, sizes=sizes, share=0.5, words="all")
    return plain["train"].dataloader, boxed["train"].dataloader


def spent(loader: Iterable[Any]) -> float:
    """Seconds of an epoch."""
    start = time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - start


def show_regions_speed(results: list[dict[str, Any]]) -> None:
    """Print them."""
    print("\nopen_clip's loader of a CSV with --sparc-regions boxes, one process")
    for each in results:
        low, middle, high = each["times"]
        print(
            f"  {each['images']:24} {each['milliseconds']:6.2f} ms a pair; boxes in {each['boxes']:16} "
            f"{middle:.2f} times as long ({low:.2f} to {high:.2f})"
        )
