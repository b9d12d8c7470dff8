"""Scenes on disk as open_clip's training reads them, with the ground truth of the held-out splits beside them.

folder/
  world.txt                       the world's name
  train.csv, val.csv, test.csv    tab-separated, columns filepath (absolute) and title
  images/SPLIT/NNNNN.png
  val.json, test.json             per scene: its caption and its objects (kind, colour, size, boxes, words ...)
  val.npz, test.npz               labels: uint8 [N, 64, 64]; 0 is background, i + 1 the scene's object i
"""

import csv
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..processes import process_pool
from .folders import drafted
from .scene import Scene, SceneObject, generate_scene
from .world import SPLITS, Split
from .worlds import WORLDS

SIZES: dict[Split, int] = {"train": 16_000, "val": 500, "test": 500}

_ANNOTATED: tuple[Split, ...] = ("val", "test")
_CHUNK = 250
_WORLD = "world.txt"


@dataclass(frozen=True)
class Annotations:
    """The ground truth of a held-out split, for evaluation only.

    Attributes:
        images: N absolute paths.
        captions: N captions.
        objects: the objects of each scene.
        labels: uint8 [N, 64, 64]; 0 is background, i + 1 the pixels of the scene's object i.
    """

    images: list[Path]
    captions: list[str]
    objects: list[tuple[SceneObject, ...]]
    labels: np.ndarray


def write_dataset(
    folder: str | Path,
    sizes: Mapping[Split, int] = SIZES,
    seed: int = 0,
    workers: int | None = None,
    world: str = "digits",
) -> Path:
    """Write the three splits; either the whole folder appears or nothing.

    Args:
        folder: must not exist.
        sizes: scenes per split.
        seed: of everything.
        workers: processes; None is one per core. The files do not depend on it.
        world: a key of `worlds.WORLDS`.

    Returns:
        The folder, absolute.

    Raises:
        FileExistsError: `folder` is there.
        ValueError: a split is unknown or has no scene, or the world is unknown.
    """
    folder = Path(folder).resolve()
    if world not in WORLDS:
        raise ValueError(f"world is {world!r}; expected one of {', '.join(map(repr, WORLDS))}")
    for split, size in sizes.items():
        if split not in SPLITS or size < 1:
            raise ValueError(
                f"sizes has {split!r}: {size}; expected splits {', '.join(SPLITS)}, 1 or more scenes each"
            )
    with drafted(folder) as draft:
        _write_splits(draft, folder, sizes, seed, workers or os.cpu_count() or 1, world)
        (draft / _WORLD).write_text(f"{world}\n", encoding="utf-8")
    return folder


def read_world(folder: str | Path) -> str:
    """The name of the world of a data set.

    Raises:
        FileNotFoundError: the folder does not say; `write_dataset` did not write it.
    """
    path = Path(folder) / _WORLD
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {_WORLD}, so it is of an older version; expected a new folder")
    return path.read_text(encoding="utf-8").strip()


def read_annotations(folder: str | Path, split: Split) -> Annotations:
    """Read the ground truth of "val" or "test".

    Raises:
        FileNotFoundError: it is not there; training scenes have none.
    """
    folder = Path(folder).resolve()
    scenes = json.loads((folder / f"{split}.json").read_text(encoding="utf-8"))
    with np.load(folder / f"{split}.npz") as arrays:
        labels = arrays["labels"]
    objects = [
        tuple(SceneObject(**{**each, "boxes": tuple(map(tuple, each["boxes"]))}) for each in scene["objects"])
        for scene in scenes
    ]
    images = [_image_path(folder, split, index) for index in range(len(scenes))]
    return Annotations(images, [scene["caption"] for scene in scenes], objects, labels)


def read_captions(folder: str | Path, split: Split) -> list[str]:
    """The captions of a split, in its order."""
    with open(Path(folder) / f"{split}.csv", newline="", encoding="utf-8") as file:
        return [row["title"] for row in csv.DictReader(file, delimiter="\t")]


@dataclass(frozen=True)
class _Chunk:
    """Scenes `start` to `stop` (exclusive) of a split, for one process to write."""

    folder: Path
    split: Split
    start: int
    stop: int
    seed: int
    world: str


def _write_splits(draft: Path, folder: Path, sizes: Mapping[Split, int], seed: int, workers: int, world: str) -> None:
    chunks = [
        _Chunk(draft, split, start, min(start + _CHUNK, size), seed, world)
        for split, size in sizes.items()
        for start in range(0, size, _CHUNK)
    ]
    for split in sizes:
        (draft / "images" / split).mkdir(parents=True)
    captions: dict[Split, list[str]] = {split: [] for split in sizes}
    scenes: dict[Split, list[Scene]] = {split: [] for split in sizes}
    with tqdm(total=sum(sizes.values()), desc="scenes", unit="scene") as progress:
        for chunk, (said, made) in zip(chunks, _run(chunks, workers), strict=True):
            captions[chunk.split] += said
            scenes[chunk.split] += made
            progress.update(len(said))
    for split in sizes:
        _write_csv(draft / f"{split}.csv", folder, split, captions[split])
        if split in _ANNOTATED:
            _write_annotations(draft, split, scenes[split])


def _run(chunks: list[_Chunk], workers: int) -> Iterator[tuple[list[str], list[Scene]]]:
    if min(workers, len(chunks)) == 1:
        yield from map(_write_images, chunks)
        return
    with process_pool(min(workers, len(chunks))) as pool:
        yield from pool.imap(_write_images, chunks)


def _write_images(chunk: _Chunk) -> tuple[list[str], list[Scene]]:
    """Write the images; returns the captions and, where the split is annotated, the scenes."""
    captions, scenes = [], []
    for index in range(chunk.start, chunk.stop):
        scene = generate_scene(WORLDS[chunk.world], chunk.split, index, chunk.seed)
        Image.fromarray(scene.image).save(_image_path(chunk.folder, chunk.split, index), compress_level=1)
        captions.append(scene.caption)
        if chunk.split in _ANNOTATED:
            scenes.append(scene)
    return captions, scenes


def _image_path(folder: Path, split: Split, index: int) -> Path:
    return folder / "images" / split / f"{index:05d}.png"


def _write_csv(path: Path, folder: Path, split: Split, captions: list[str]) -> None:
    """Write open_clip's table, for images that will stand in `folder`."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["filepath", "title"])
        writer.writerows((_image_path(folder, split, i), caption) for i, caption in enumerate(captions))


def _write_annotations(folder: Path, split: Split, scenes: list[Scene]) -> None:
    records = [{"caption": scene.caption, "objects": [asdict(o) for o in scene.objects]} for scene in scenes]
    (folder / f"{split}.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    np.savez_compressed(folder / f"{split}.npz", labels=np.stack([scene.labels for scene in scenes]))
