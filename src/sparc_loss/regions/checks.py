"""What training with regions cannot do, refused before open_clip_train creates the run's folder."""

from argparse import Namespace
from pathlib import Path

from open_clip import CoCa
from open_clip.transform import image_transform
from torch import nn

from sparc_loss.evaluation.dataset import read_image_size
from sparc_loss.evaluation.pairs_csv import DataError, line_of, read_pairs
from sparc_loss.named_objects import parse_objects
from sparc_loss.regions.joint_transform import JointTransform
from sparc_loss.regions.training_data import COLUMN

_REFUSED = {
    "use_naflex": "NaFlex cuts each image into patches of its own grid, and the mask of a text has one size",
    "distill_model": "the teacher takes the texts of the batch as they are, with the regions behind them",
    "variable_text": "captions of variable length leave no fixed place behind the text",
}


def check_regions(args: Namespace, model: nn.Module | None) -> None:
    """Refuse what cannot be trained with `--sparc-regions`, as far as flags and files show it.

    Args:
        args: of open_clip_train.
        model: that it will create, on any device; None if that is not known.

    Raises:
        ValueError: a flag or a model that does not work with regions; a CSV without the column `boxes` or without any
            box or word, or a box that is malformed or outside its image, by file, line and text.
    """
    for flag, reason in _REFUSED.items():
        if getattr(args, flag, False):
            raise ValueError(f"--{flag.replace('_', '-')} is set; expected it off with --sparc-regions: {reason}")
    # open_clip_train sets args.variable_text from the model, later than this.
    if getattr(getattr(model, "text", None), "variable_text", False):
        raise ValueError(
            f"--model is {args.model}; expected another with --sparc-regions: {_REFUSED['variable_text']}"
        )
    if isinstance(model, CoCa):
        raise ValueError(
            f"--model is {args.model}, a CoCa; expected a CLIP with --sparc-regions: its captioning loss takes the "
            "texts of the batch as they are, with the regions behind them"
        )
    # open_clip's and timm's PatchDropout, and timm's PatchDropoutWithIndices.
    modules = () if model is None else model.modules()
    dropouts = (each for each in modules if type(each).__name__.startswith("PatchDropout"))
    if any(getattr(each, "prob", 0) > 0 for each in dropouts):
        raise ValueError(
            "the model drops patches in training (--force-patch-dropout, or its configuration); expected none with "
            "--sparc-regions: the mask of a text has a place for every patch"
        )
    JointTransform(image_transform(224, is_train=True, aug_cfg=getattr(args, "aug_cfg", None)))
    kind = args.dataset_type
    if kind == "auto":
        kind = "csv" if str(args.train_data).endswith((".csv", ".tsv")) else "webdataset"
    if kind not in ("csv", "webdataset"):
        raise ValueError(f"--dataset-type is {kind}; expected csv or webdataset with --sparc-regions")
    if kind == "csv" and getattr(args, "rank", 0) == 0:
        check_csv(args.train_data, args.csv_separator, args.csv_img_key, args.csv_caption_key)


def check_csv(path: str, separator: str, image_key: str, caption_key: str) -> None:
    """Refuse a CSV whose boxes cannot be trained with; the images of rows with boxes are opened for their size.

    Raises:
        DataError: as `check_regions`; an image of a row with boxes that cannot be opened.
    """
    table = read_pairs(path, separator, image_key, caption_key, [COLUMN])
    if COLUMN not in table.columns:
        raise DataError(
            f"--train-data {path} has the columns {', '.join(map(str, table.columns))}; expected {COLUMN} among them "
            "with --sparc-regions boxes"
        )
    boxed = (table[COLUMN] != "").to_numpy().nonzero()[0].tolist()
    if not boxed:
        raise DataError(f"--train-data {path} has no row with {COLUMN}; expected one or more with --sparc-regions")
    names_words = False
    for row in boxed:
        image, caption, text = (table[key].iloc[row] for key in (image_key, caption_key, COLUMN))
        try:
            height, width = read_image_size(Path(str(image)))
            for each in parse_objects(text, str(caption)):
                names_words |= bool(each.words)
                left, top, right, bottom = each.box
                if left < 0 or top < 0 or right > width or bottom > height:
                    raise DataError(
                        f"the box {list(each.box)} of {each.phrase!r} is outside its image, {width} x {height} pixels"
                    )
        except ValueError as error:
            raise DataError(f"{path}, line {line_of(table, row)}: {error}") from error
    if not names_words:
        raise DataError(
            f"--train-data {path}: no object of the column {COLUMN} has words; expected the positions in "
            "title.split() of the words that name it, as without them a box restricts nothing"
        )
