"""Where PASCAL VOC's images, masks and lists lie; PASCAL Context has a year and masks of its own there."""

from collections.abc import Mapping
from functools import partial

from sparc_loss.evaluation.dataset import EvaluationData, MaskCoding, read_lines
from sparc_loss.evaluation.protocol import Protocol
from sparc_loss.evaluation.suites.suite import DataFolder, Names, Suite, segmentation_data

_WITH_BACKGROUND = MaskCoding()
_WITHOUT_BACKGROUND = MaskCoding(background=False, ignored=(0, 255))


def devkit_suite(
    name: str,
    title: str,
    year: str,
    masks: str,
    lists: str,
    classes: Names,
    protocols: Mapping[str, Protocol],
    *,
    background: bool,
) -> Suite:
    """A suite of segmentation in `VOCdevkit`.

    Args:
        name: of the suite.
        title: of the suite.
        year: such as "VOC2012".
        masks: the folder of masks, whose value 0 is background and 1 the first class.
        lists: the folder of val.txt in ImageSets.
        classes: the names of each class.
        protocols: of the suite.
        background: count background as a class, or leave it out.
    """
    root = f"VOCdevkit/{year}"
    split = f"{root}/ImageSets/{lists}/val.txt"
    coding = _WITH_BACKGROUND if background else _WITHOUT_BACKGROUND
    layout = (f"{root}/JPEGImages/*.jpg", f"{root}/{masks}/*.png", split)
    return Suite(name, title, layout, partial(_read, root, masks, split, classes, coding), protocols=protocols)


def _read(
    root: str, masks: str, split: str, classes: Names, coding: MaskCoding, folder: DataFolder
) -> Mapping[str, EvaluationData]:
    base, listing = folder.find(root), folder.find(split)
    rows = [(base / "JPEGImages" / f"{name}.jpg", base / masks / f"{name}.png") for name in read_lines(listing)]
    return segmentation_data(folder, rows, listing, classes, coding)
