"""What a suite is: a reader of a published data set where everybody has it on disk, and how the figures are taken."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

from sparc_loss.evaluation.dataset import DataError, EvaluationData, MaskCoding
from sparc_loss.evaluation.protocol import Protocol

Row = TypeVar("Row")

Names = tuple[tuple[str, ...], ...]
"""The names of each class."""


class DataFolder:
    """The folder of all data sets, as one suite sees it.

    Args:
        root: `--data-root`.
        suite: whose files are looked for.
        skip_missing: leave out what a list names and the folder lacks, and note it, instead of refusing.
    """

    def __init__(self, root: Path, suite: "Suite", skip_missing: bool = False) -> None:
        self.root, self.suite, self.skip_missing = root, suite, skip_missing
        self.notes: list[str] = []

    def find(self, *candidates: str) -> Path:
        """The first of the paths below the root that exists.

        Raises:
            DataError: none does; says what is expected.
        """
        for candidate in candidates:
            if (self.root / candidate).exists():
                return self.root / candidate
        raise DataError(
            f"{self.suite.name}: there is no {self.root / candidates[0]}; expected in --data-root: "
            f"{', '.join(self.suite.layout)}"
        )

    def existing(self, rows: Sequence[Row], paths: Callable[[Row], Iterable[Path]], listing: Path) -> list[Row]:
        """The rows of a list whose files all exist.

        Args:
            rows: of the list.
            paths: of the files of a row.
            listing: the file with the list.

        Raises:
            DataError: a file is missing, unless `skip_missing`; no row is left.
        """
        missing = [[path for path in paths(row) if not path.is_file()] for row in rows]
        kept = [row for row, lacks in zip(rows, missing, strict=True) if not lacks]
        absent = [path for lacks in missing for path in lacks]
        if absent:
            found = f"{listing} names {absent[0]}, which is not there"
            found += f", and {len(absent) - 1} further files" if len(absent) > 1 else ""
            if not self.skip_missing or not kept:
                raise DataError(f"{self.suite.name}: {found}; --skip-missing leaves such images out")
            self.notes.append(f"{len(rows) - len(kept)} of {len(rows)} rows left out: {found}")
        if not kept:
            raise DataError(f"{self.suite.name}: {listing} names no image; expected at least one")
        return kept


@dataclass(frozen=True)
class Suite:
    """A published benchmark.

    Attributes:
        name: as `--suite` takes it.
        title: what is measured on what, in a few words.
        layout: the files below `--data-root`.
        read: returns the data by part; one part has the name "".
        families: of measures, see `sparc_loss.evaluation.evaluate`; none for segmentation in windows.
        protocols: of segmentation in windows, by the name of the preset; the first is the default.
        protocol: of other measures, in a few words.
    """

    name: str
    title: str
    layout: tuple[str, ...]
    read: Callable[[DataFolder], Mapping[str, EvaluationData]]
    families: tuple[str, ...] = ()
    protocols: Mapping[str, Protocol] = field(default_factory=dict)
    protocol: str = ""


@cache
def class_names(file: str) -> Names:
    """The names of classes in a file of this package: a class per line, its names separated by commas."""
    return split_names(package_lines(f"classes/{file}.txt"))


def package_lines(file: str) -> list[str]:
    """The lines of a text file of this package."""
    return (files("sparc_loss.evaluation.suites") / file).read_text("utf-8").splitlines()


def split_names(lines: Iterable[str]) -> Names:
    """The names of each class, of lines such as "television, tv, screen"."""
    return tuple(tuple(name.strip() for name in line.split(",") if name.strip()) for line in lines)


def segmentation_data(
    folder: DataFolder,
    rows: Sequence[tuple[Path, Path]],
    listing: Path,
    classes: Names,
    coding: MaskCoding,
) -> Mapping[str, EvaluationData]:
    """Images with masks, for a reader of a suite.

    Args:
        folder: of the data sets.
        rows: the image and the mask of each row.
        listing: the file or folder that names them.
        classes: the names of each class; the first is shown.
        coding: of the masks.
    """
    data = EvaluationData([names[0] for names in classes], mask_coding=coding)
    for image, mask in folder.existing(rows, lambda row: row, listing):
        data.add_image(image, mask)
    return {"": data}
