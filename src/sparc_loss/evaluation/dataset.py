"""The CSV that `sparc-loss evaluate` reads: the one of open_clip's training, with further columns for the images.

    filepath       an image; rows of one filepath are captions of one image
    title          a caption
    boxes          objects of the caption, a JSON list of {"phrase": "a red seven", "box": [left, top, right, bottom]}
                   in pixels of the file, right and bottom exclusive; {..., "words": [1, 2]} says which words of
                   title.split() name the object; a phrase or a word with several boxes is found in any of them
    mask           a PNG of the image's size, 8 bits a pixel: 0 is background, i line i of the classes, 255 ignored
    label          the image's class, a line of the classes
    hard_negative  a caption like title, but wrong of the image, such as one with attributes swapped

All but the first two may be missing or, in a row, empty. Paths are relative to the working directory, as open_clip's.
The file is read as open_clip's training reads it, by pandas: a caption such as NA or an empty one is the word "nan".
"""

import logging
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparc_loss.evaluation.pairs_csv import DataError, line_of, missing_captions, read_pairs, separator_of
from sparc_loss.evaluation.segmentation import BACKGROUND
from sparc_loss.named_objects import Box, NamedObject, parse_objects

if TYPE_CHECKING:
    from PIL import Image

# Value in the tensors that `read_mask` returns; a mask of 8 bits has no such class.
IGNORED = 255
_NO_LABEL = -2

COLUMNS = ("boxes", "mask", "label", "hard_negative")


@dataclass(frozen=True)
class MaskCoding:
    """What the values of a mask's pixels mean.

    Attributes:
        first: the value of the first class; those of the others follow.
        background: whether the value before the first is background.
        ignored: values of pixels that are left out of everything.
    """

    first: int = 1
    background: bool = True
    ignored: tuple[int, ...] = (IGNORED,)


@dataclass
class EvaluationData:
    """N images and their M captions; M is 0 where only classes are measured.

    Attributes:
        images: N paths.
        captions: M captions.
        image_index: the image of each caption.
        objects: the objects of each caption.
        hard_negatives: the swapped caption of each caption, or None.
        masks: N paths, or None.
        labels: the class of each image, or None.
        classes: the names of the C classes.
        crops: the box of each image that is looked at, in pixels; None, or an empty list, is all of it.
        groups: what the hard negative of each caption is about, for the mean over groups; None is in no group, and an
            empty list is no groups.
        mask_coding: of all masks.
        notes: what was left out, one line each.
    """

    classes: list[str]
    images: list[Path] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    image_index: list[int] = field(default_factory=list)
    objects: list[tuple[NamedObject, ...]] = field(default_factory=list)
    hard_negatives: list[str | None] = field(default_factory=list)
    masks: list[Path | None] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)
    crops: list[Box | None] = field(default_factory=list)
    groups: list[str | None] = field(default_factory=list)
    mask_coding: MaskCoding = MaskCoding()
    notes: list[str] = field(default_factory=list)

    def add_image(
        self, image: Path, mask: Path | None = None, label: int | None = None, crop: Box | None = None
    ) -> int:
        """Add an image; returns its number."""
        self.images.append(image)
        self.masks.append(mask)
        self.labels.append(label)
        self.crops.append(crop)
        return len(self.images) - 1

    def add_caption(
        self,
        image: int,
        caption: str,
        objects: tuple[NamedObject, ...] = (),
        hard_negative: str | None = None,
        group: str | None = None,
    ) -> None:
        """Add a caption of an image."""
        self.captions.append(caption)
        self.image_index.append(image)
        self.objects.append(objects)
        self.hard_negatives.append(hard_negative)
        self.groups.append(group)

    def first(self, images: int) -> "EvaluationData":
        """The first images alone, with their captions."""
        kept = [caption for caption, image in enumerate(self.image_index) if image < images]
        of_images: dict[str, Any] = {
            name: getattr(self, name)[:images] for name in ("images", "masks", "labels", "crops")
        }
        of_captions: dict[str, Any] = {
            name: [getattr(self, name)[caption] for caption in kept] if getattr(self, name) else []
            for name in ("captions", "image_index", "objects", "hard_negatives", "groups")
        }
        return replace(self, **of_images, **of_captions)

    def captions_of(self) -> list[list[int]]:
        """The captions of each image."""
        captions: list[list[int]] = [[] for _ in self.images]
        for caption, image in enumerate(self.image_index):
            captions[image].append(caption)
        return captions


def read_data(
    path: str | Path,
    classes: list[str] | None = None,
    *,
    separator: str | None = None,
    image_key: str = "filepath",
    caption_key: str = "title",
    columns: Collection[str] = COLUMNS,
) -> EvaluationData:
    """Read the CSV and check that the images exist, without opening them. Warns of captions that are read as "nan".

    Args:
        path: of the CSV; a file, or an address that pandas can open.
        classes: names of the classes, which the columns mask and label need.
        separator: None is a tab if the first line contains one, otherwise a comma.
        image_key: column of the images.
        caption_key: column of the captions.
        columns: which of the further columns to read, where they are there.

    Raises:
        DataError: a file or row that cannot be read, with file and line.
    """
    data = EvaluationData(list(classes or []))
    separator = separator_of(path) if separator is None else separator
    table = read_pairs(path, separator, image_key, caption_key, columns)
    for column in ("mask", "label"):
        if column in columns and column in table.columns and not data.classes:
            raise DataError(f"{path} has a column {column}; expected the names of the classes with it (--classes)")
    further = table[[column for column in columns if column in table.columns]].to_dict("records")
    pairs = zip(table[image_key].tolist(), table[caption_key].tolist(), strict=True)
    known: dict[str, int] = {}
    for index, (image, caption) in enumerate(pairs):
        row = further[index] if further else {}
        try:
            _add(data, row, known, str(image), str(caption))
        except DataError as error:
            raise DataError(f"{path}, line {line_of(table, index)}: {error}") from error
    if not data.images:
        raise DataError(f"{path} has no row; expected at least one image")
    warning = missing_captions(table, path, separator, caption_key)
    if warning is not None:
        logging.warning(warning)
    return data


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file, stripped, such as the names of classes.

    Raises:
        DataError: it cannot be read, is empty, or has an empty or a repeated line.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not lines or "" in lines:
        where = f"line {lines.index('') + 1} is empty" if lines else "it is empty"
        raise DataError(f"{path}: {where}; expected one entry per line")
    known = set()
    for line in lines:
        if line in known:
            raise DataError(f"{path} has {line!r} twice; expected different lines")
        known.add(line)
    return lines


def read_image(path: Path) -> "Image.Image":
    """The image, decoded.

    Raises:
        DataError: it cannot be read.
    """
    with _opened(path) as image:
        image.load()
        return image.copy()  # a file of several frames would stay open


def read_image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image in pixels, without decoding it.

    Raises:
        DataError: it cannot be read.
    """
    with _opened(path) as image:
        return image.height, image.width


@contextmanager
def _opened(path: Path) -> "Iterator[Image.Image]":
    """An image file; what goes wrong with it names the file."""
    from PIL import Image  # a dependency of open_clip; the command must be able to report that it is missing

    try:
        with Image.open(path) as image:
            yield image
    except MemoryError:
        raise
    # Pillow's errors for a broken file depend on its format; for too many pixels it is a DecompressionBombError.
    except Exception as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from error


def read_mask(
    path: Path,
    size: tuple[int, int],
    num_classes: int,
    coding: MaskCoding = MaskCoding(),
) -> Tensor:
    """The classes of the pixels, int64 [H, W]: 0 to num_classes - 1, BACKGROUND or IGNORED.

    Args:
        path: of the PNG.
        size: height and width of its image.
        num_classes: C.
        coding: what the values mean.

    Raises:
        DataError: it cannot be read, has another size or more than 8 bits, or a value that is not a class.
    """
    import numpy as np

    picture = read_image(path)
    if picture.mode not in ("L", "P", "1"):
        raise DataError(f"{path} has mode {picture.mode}; expected 8 bits a pixel, grey or palette")
    values = np.asarray(picture).astype(np.int64)
    if values.shape != size:
        raise DataError(f"{path} is {list(values.shape)}, its image {list(size)}; expected the same height and width")
    labels = np.full(256, _NO_LABEL)
    labels[coding.first : coding.first + num_classes] = np.arange(num_classes)
    if coding.background:
        labels[coding.first - 1] = BACKGROUND
    labels[list(coding.ignored)] = IGNORED
    target = labels[values]
    wrong = values[target == _NO_LABEL]
    if wrong.size:
        first, last = coding.first - coding.background, coding.first + num_classes - 1
        meaning = "background, classes" if coding.background else "classes"
        ignored = " or ".join(map(str, coding.ignored))
        raise DataError(f"{path} has the value {wrong[0]}; expected {first} to {last} ({meaning}) or {ignored}")
    return torch.from_numpy(target)


def _add(data: EvaluationData, row: dict[str, Any], known: dict[str, int], image: str, caption: str) -> None:
    if image not in known:
        known[image] = len(data.images)
        data.add_image(_file(image))
    index = known[image]
    try:
        objects = parse_objects(row["boxes"], caption) if row.get("boxes") else ()
    except ValueError as error:
        raise DataError(str(error)) from error
    data.add_caption(index, caption, objects, row.get("hard_negative") or None)
    if row.get("mask"):
        data.masks[index] = _same(data.masks[index], _file(row["mask"]), "mask", image)
    if row.get("label"):
        if row["label"] not in data.classes:
            raise DataError(f"label is {row['label']!r}; expected one of the {len(data.classes)} classes")
        data.labels[index] = _same(data.labels[index], data.classes.index(row["label"]), "label", image)


def _file(text: str) -> Path:
    if not os.path.isfile(text):  # False for a text that is too long for a path
        raise DataError(f"there is no file {text!r}")
    return Path(text)


def _same(before: Any, now: Any, column: str, image: str) -> Any:
    if before not in (None, now):
        raise DataError(f"{column} differs from that of an earlier row; expected one {column} for {image}")
    return now
