"""What `--sparc-regions` cannot train is refused before the run's folder is made."""

import csv
import json
import re
from argparse import Namespace

import pytest
from open_clip.transformer import PatchDropout
from PIL import Image
from tiny_models import clip, coca

from sparc_loss.regions.checks import check_regions


@pytest.fixture
def csv_with(tmp_path):
    Image.new("RGB", (32, 20)).save(tmp_path / "image.png")

    def write(*boxes, column="boxes"):
        with open(tmp_path / "train.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerow(["filepath", "title", column])
            for each in boxes:
                writer.writerow(
                    [tmp_path / "image.png", "a red seven", each if isinstance(each, str) else json.dumps(each)]
                )
        return str(tmp_path / "train.csv")

    return write


def args(train_data, **changes) -> Namespace:
    given = {"train_data": train_data, "dataset_type": "auto", "csv_separator": "\t", "csv_img_key": "filepath"}
    return Namespace(**{**given, "csv_caption_key": "title", "aug_cfg": {}, "rank": 0, "model": "tiny", **changes})


def box(*numbers, **more):
    return {"phrase": "a seven", "box": numbers, **more}


def test_good_boxes_are_taken(csv_with):
    check_regions(args(csv_with([box(0, 0, 32, 20, words=[1, 2])], "", [box(0.5, 1, 3, 4)])), clip())


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (
            [box(0, 0, 33, 20)],
            "line 3: the box [0.0, 0.0, 33.0, 20.0] of 'a seven' is outside its image, 32 x 20 pixels",
        ),
        ([box(-1, 0, 3, 2)], "line 3: the box [-1.0, 0.0, 3.0, 2.0] of 'a seven' is outside its image"),
        (
            [box(5, 0, 3, 2)],
            'line 3: boxes is \'[{"phrase": "a seven", "box": [5, 0, 3, 2]}]\' (ValueError: a box is empty)',
        ),
        ([box(0, 0, 3, 2, words=[3])], "(ValueError: words are not positions in title.split(), 0 to 2)"),
        ("nonsense", "line 3: boxes is 'nonsense' (JSONDecodeError: "),
        ('[{"phrase": "a", "box": [0, 0, 1, Infinity]}]', "(ValueError: a box is not finite)"),
        (f'[{{"phrase": "a", "box": [0, 0, 1, 1{400 * "0"}]}}]', "(OverflowError: int too large to convert to float)"),
        (100_000 * "[", "(RecursionError: "),
        ([{"box": [0, 0, 1, 1]}], "(KeyError: 'phrase')"),
    ],
    ids=["beyond", "negative", "empty", "words", "JSON", "infinite", "huge", "deep", "key"],
)
def test_a_malformed_box_is_refused_with_file_line_and_text(csv_with, boxes, message):
    path = csv_with([box(0, 0, 5, 5)], boxes)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        check_regions(args(path), clip())
    assert str(caught.value).startswith(f"{path}, line 3: ")


def test_only_the_first_process_reads_the_file(csv_with):
    check_regions(args(csv_with("nonsense"), rank=1), clip())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_naflex": True}, "--use-naflex is set; expected it off with --sparc-regions: NaFlex cuts each image"),
        ({"distill_model": "RN50"}, "--distill-model is set; expected it off with --sparc-regions: the teacher takes"),
        ({"variable_text": True}, "--variable-text is set; expected it off with --sparc-regions: captions of"),
        (
            {"dataset_type": "synthetic"},
            "--dataset-type is synthetic; expected csv or webdataset with --sparc-regions",
        ),
        ({"aug_cfg": {"use_timm": True}}, "the image transform has the step RandomResizedCropAndInterpolation"),
    ],
    ids=str,
)
def test_what_does_not_work_with_regions_is_refused_by_its_flag(csv_with, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_regions(args(csv_with([box(0, 0, 5, 5)]), **changes), clip())


def test_a_coca_is_refused(csv_with):
    with pytest.raises(ValueError, match="--model is tiny, a CoCa; expected a CLIP with --sparc-regions"):
        check_regions(args(csv_with([box(0, 0, 5, 5)])), coca())


class PatchDropoutWithIndices(PatchDropout):
    """As timm has it beside rotary embeddings."""


@pytest.mark.parametrize("dropout", [PatchDropout, PatchDropoutWithIndices])
def test_patch_dropout_is_refused(csv_with, dropout):
    model = clip()
    model.visual.patch_dropout = dropout(0.5)
    with pytest.raises(ValueError, match="the model drops patches in training"):
        check_regions(args(csv_with([box(0, 0, 5, 5)])), model)


def test_a_csv_without_the_column_or_without_a_box_is_refused(csv_with):
    with pytest.raises(ValueError, match="has the columns filepath, title, box; expected boxes among them"):
        check_regions(args(csv_with("", column="box")), clip())
    with pytest.raises(ValueError, match="has no row with boxes; expected one or more"):
        check_regions(args(csv_with("", "")), clip())


def test_boxes_without_words_are_refused(csv_with):
    with pytest.raises(ValueError, match="no object of the column boxes has words; expected the positions in title"):
        check_regions(args(csv_with([box(0, 0, 5, 5)])), clip())


def test_an_image_that_cannot_be_opened_is_refused(csv_with, tmp_path):
    path = csv_with([box(0, 0, 5, 5)])
    (tmp_path / "image.png").write_bytes(b"")
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: {tmp_path / 'image.png'} cannot be read")):
        check_regions(args(path), clip())
