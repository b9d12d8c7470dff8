"""The objects of a CSV, image by image, and their names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparc_loss.evaluation.dataset import DataError, read_data
from sparc_loss.named_objects import Box

Objects = list[tuple[str, Box]]
"""Of an image: names and boxes in pixels of the file."""


@dataclass(frozen=True)
class DetectionData:
    """N images and the objects of each.

    Attributes:
        images: N paths.
        objects: of each image, each name and box once.
    """

    images: list[Path]
    objects: list[Objects]

    @property
    def names(self) -> list[str]:
        """Every name, sorted."""
        return sorted({name for objects in self.objects for name, _ in objects})


def as_tensors(objects: Objects, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The boxes [T, 4], in pixels, and the names int64 [T] as places in `names`."""
    number = {name: place for place, name in enumerate(names)}
    boxes = torch.tensor([box for _, box in objects], dtype=torch.float32).reshape(-1, 4)
    return boxes, torch.tensor([number[name] for name, _ in objects], dtype=torch.long)


def read_objects(path: str) -> DetectionData:
    """Read a CSV with the column `boxes`; a phrase is the name of a class.

    Raises:
        DataError: a file or row that cannot be read, or no box in the whole file.
    """
    data = read_data(path, columns=("boxes",))
    objects: list[dict[tuple[str, Box], None]] = [{} for _ in data.images]
    for image, named in zip(data.image_index, data.objects, strict=True):
        objects[image].update({(each.phrase, each.box): None for each in named})
    if not any(objects):
        raise DataError(f"{path} has no boxes; expected a column boxes with the objects of the images")
    return DetectionData(data.images, [list(each) for each in objects])
