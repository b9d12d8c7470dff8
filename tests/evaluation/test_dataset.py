"""The CSV of images, captions, boxes, masks, labels and hard negatives, and what is refused of it."""

import gzip
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip_train.data import CsvDataset
from PIL import Image

from sparc_loss.evaluation import BACKGROUND
from sparc_loss.evaluation.dataset import (
    IGNORED,
    DataError,
    EvaluationData,
    MaskCoding,
    NamedObject,
    read_data,
    read_image,
    read_image_size,
    read_lines,
    read_mask,
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with two images and a mask in it."""
    monkeypatch.chdir(tmp_path)
    for name in ("one.png", "two.png", "mask.png"):
        (tmp_path / name).touch()
    return tmp_path


def write(folder, *lines):
    path = folder / "data.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def boxes(*objects):
    """A field of a CSV with commas in it."""
    return '"' + json.dumps(objects).replace('"', '""') + '"'


def test_open_clips_own_csv(folder):
    data = read_data(write(folder, "filepath\ttitle", "one.png\ta red, tiny seven", "two.png\t"))
    assert [path.name for path in data.images] == ["one.png", "two.png"]
    assert data.captions == ["a red, tiny seven", "nan"]
    assert data.image_index == [0, 1]
    assert data.objects == [(), ()]
    assert data.masks == data.labels == data.hard_negatives == [None, None]


def test_commas_where_the_first_line_has_no_tab(folder):
    data = read_data(write(folder, "title,filepath", '"red, tiny",one.png'))
    assert data.captions == ["red, tiny"]


def test_a_separator_and_columns_by_name(folder):
    path = write(folder, "url;text;title", "one.png;a dog;no")
    assert read_data(path, separator=";", image_key="url", caption_key="text").captions == ["a dog"]


def test_a_byte_order_mark_is_no_part_of_the_first_column(folder):
    assert read_data(write(folder, "\ufefffilepath,title", "one.png,a dog")).captions == ["a dog"]


def test_rows_of_one_file_are_captions_of_one_image(folder):
    data = read_data(write(folder, "filepath,title", "one.png,a", "two.png,b", "one.png,c"))
    assert data.image_index == [0, 1, 0]
    assert data.captions_of() == [[0, 2], [1]]


def test_all_columns(folder):
    field = boxes({"phrase": "a red seven", "box": [1, 2, 3.5, 4], "words": [0, 1]})
    path = write(
        folder,
        "filepath,title,boxes,mask,label,hard_negative",
        f"one.png,red seven,{field},mask.png,star,blue seven",
        "one.png,a star,,,,",
    )
    data = read_data(path, ["seven", "star"])
    assert data.objects == [(NamedObject("a red seven", (1, 2, 3.5, 4), (0, 1)),), ()]
    assert [mask.name for mask in data.masks] == ["mask.png"]
    assert data.labels == [1]
    assert data.hard_negatives == ["blue seven", None]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["path,title", "one.png,a"], "has the columns path, title; expected filepath among them"),
        ([""], "has the columns none; expected filepath among them"),
        (["filepath,title"], "has no row; expected at least one image"),
        (["filepath,title", "one.png,a", "three.png,b"], "line 3: there is no file 'three.png'"),
        (["filepath,title", "one.png,a", "two.png,a,b"], "cannot be read: Error tokenizing data. C error: Expected 2"),
        (["filepath,title", 'one.png,"a'], "cannot be read: Error tokenizing data. C error: EOF inside string"),
        (["filepath,title", '"one.png","a\nb"', "three.png,b"], "line 4: there is no file 'three.png'"),
        (["filepath,title,mask", "one.png,a,no.png"], "line 2: there is no file 'no.png'"),
        (["filepath,title,label", "one.png,a,moon"], "line 2: label is 'moon'; expected one of the 2 classes"),
        (
            ["filepath,title,label", "one.png,a,star", "one.png,b,seven"],
            "line 3: label differs from that of an earlier row; expected one label for one.png",
        ),
        (
            ["filepath,title,mask", "one.png,a,mask.png", "one.png,b,two.png"],
            "line 3: mask differs from that of an earlier row; expected one mask for one.png",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_with_file_and_line(folder, lines, message):
    path = write(folder, *lines)
    with pytest.raises(DataError) as error:
        read_data(path, ["seven", "star"])
    assert message in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("objects", "reason"),
    [
        ([{"phrase": "a", "box": [0, 0, 0, 1]}], "a box is empty"),
        ([{"phrase": "a", "box": [0, 2, 1, 1]}], "a box is empty"),
        ([{"phrase": "a", "box": [0, 0, 1]}], "not enough values"),
        ([{"phrase": "a", "box": [0, 0, 1, float("nan")]}], "a box is not finite"),
        ([{"phrase": " ", "box": [0, 0, 1, 1]}], "a phrase is not a text"),
        ([{"box": [0, 0, 1, 1]}], "KeyError: 'phrase'"),
        ([{"phrase": "a", "box": [0, 0, 1, 1], "words": [2]}], "words are not positions in title.split(), 0 to 1"),
        ([{"phrase": "a", "box": [0, 0, 1, 1], "words": [True]}], "words are not positions"),
        ([{"phrase": "a", "box": [0, 0, 1, 1], "word": [0]}], "an unknown key"),
        ([7], "TypeError"),
    ],
)
def test_boxes_that_cannot_be_read_are_refused(folder, objects, reason):
    path = write(folder, "filepath,title,boxes", f"one.png,red seven,{boxes(*objects)}")
    with pytest.raises(DataError) as error:
        read_data(path)
    assert "line 2: boxes is '[" in str(error.value)
    assert reason in str(error.value)
    assert "expected a JSON list of" in str(error.value)


def test_boxes_that_are_no_json_are_refused(folder):
    with pytest.raises(DataError, match=r"line 2: boxes is '1 2 3 4' \(JSONDecodeError"):
        read_data(write(folder, "filepath,title,boxes", "one.png,a,1 2 3 4"))


def test_columns_that_are_not_asked_for_are_not_read(folder):
    path = write(folder, "filepath\ttitle\tboxes\tmask\tlabel", "one.png\ta star\tno json\tmask.png\tunknown")
    data = read_data(path, columns=())
    assert (data.captions, data.objects, data.masks, data.labels) == (["a star"], [()], [None], [None])
    with pytest.raises(DataError, match=r"line 2: boxes is 'no json'"):
        read_data(path, columns=("boxes",))


@pytest.mark.parametrize("column", ["mask", "label"])
def test_masks_and_labels_need_the_names_of_the_classes(folder, column):
    path = write(folder, f"filepath,title,{column}", "one.png,a,mask.png")
    with pytest.raises(
        DataError, match=f"has a column {column}; expected the names of the classes with it .--classes"
    ):
        read_data(path)


@pytest.mark.parametrize(
    "lines",
    [
        ["filepath\ttitle", 'one.png\t"Stop" sign on a pole', 'two.png\tthe 3" nail'],
        ["filepath\ttitle", "one.png\t001", "two.png\t2"],
        ["filepath\ttitle", "one.png\tNA", "two.png\tNone"],
        ["filepath\ttitle", "one.png\t" + "long " * 40_000, "two.png\ta"],
        ["filepath\ttitle", "one.png", "two.png\tfewer fields above"],
        ["filepath\ttitle", "", "one.png\ta blank line above"],
    ],
    ids=["quotes", "numbers", "missing values", "200,000 characters", "a short row", "a blank line"],
)
@pytest.mark.parametrize("separator", [None, "\t", r"\t"])
def test_captions_are_those_that_training_reads(folder, lines, separator):
    path = write(folder, *lines)
    training = CsvDataset(
        *(str(path), lambda image: 0),
        img_key="filepath",
        caption_key="title",
        sep=separator or "\t",
        tokenizer=lambda texts: texts,
    )
    for name in ("one.png", "two.png"):
        Image.new("RGB", (1, 1)).save(folder / name)
    samples = [training[index] for index in range(len(training))]
    expected = [sample["text"] if isinstance(sample, dict) else sample[1] for sample in samples]
    assert read_data(path, separator=separator).captions == expected


def test_the_further_columns_are_texts_as_written(folder):
    path = write(folder, "filepath,title,label,hard_negative", "one.png,a,007,NA", "two.png,b,NA,12")
    data = read_data(path, ["007", "NA"])
    assert data.hard_negatives == ["NA", "12"]
    assert data.labels == [0, 1]


def test_captions_that_are_read_as_nan_are_warned_of_with_what_the_file_has(folder, caplog):
    read_data(write(folder, "filepath,title", 'one.png,"two\nlines"', "one.png,NA", "two.png,", "two.png,None"))
    assert "3 of 4 captions in" in caplog.text
    assert "are read as the word 'nan': pandas takes '', 'NA', 'None' for missing values; the first is in line 4" in (
        caplog.text
    )


def test_a_home_folder_an_address_and_a_compressed_file_are_read(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    path = write(folder, "filepath,title", "one.png,a dog")
    with gzip.open(folder / "data.csv.gz", "wb") as file:
        file.write(path.read_bytes())
    for address in ("~/data.csv", path.as_uri(), str(folder / "data.csv.gz")):
        assert read_data(address).captions == ["a dog"]


def test_a_missing_csv_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"none\.csv cannot be read: .*No such file"):
        read_data(tmp_path / "none.csv")


def test_forty_thousand_lines_are_read_at_once(tmp_path):
    """Seconds, where comparing every line with every other took a minute and a half."""
    words = [f"word {number}" for number in range(40_000)]
    (tmp_path / "words.txt").write_text("\n".join(words), encoding="utf-8")
    start = time.process_time()
    assert read_lines(tmp_path / "words.txt") == words
    assert time.process_time() - start < 10


def test_an_image_of_too_many_pixels_is_refused(tmp_path, monkeypatch):
    Image.new("1", (100, 100)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"large\.png cannot be read as an image: Image size \(10000 pixels\) exceeds"):
        read_image(tmp_path / "large.png")


def test_a_csv_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "binary.csv").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(DataError, match=r"binary\.csv cannot be read: 'utf-8' codec"):
        read_data(tmp_path / "binary.csv")


def test_lines_of_a_file(tmp_path):
    (tmp_path / "classes.txt").write_text("seven\n a star \n", encoding="utf-8")
    assert read_lines(tmp_path / "classes.txt") == ["seven", "a star"]


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    (tmp_path / "classes.txt").write_text("\ufeffseven\na star\n", encoding="utf-8")
    assert read_lines(tmp_path / "classes.txt") == ["seven", "a star"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "it is empty"), ("a\n\nb\n", "line 2 is empty"), ("a\nb\na\n", "has 'a' twice; expected different lines")],
)
def test_lines_that_name_nothing_or_the_same_are_refused(tmp_path, text, message):
    (tmp_path / "classes.txt").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_lines(tmp_path / "classes.txt")


def test_a_file_that_is_no_image_is_refused(tmp_path):
    (tmp_path / "text.png").write_text("no image", encoding="utf-8")
    with pytest.raises(DataError, match=r"text\.png cannot be read as an image: cannot identify"):
        read_image(tmp_path / "text.png")


def test_an_image_cut_short_is_refused(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    with pytest.raises(DataError, match=r"cut\.png cannot be read as an image"):
        read_image(tmp_path / "cut.png")


def mask(folder, values, mode="L"):
    Image.fromarray(np.array(values, np.uint8)).convert(mode).save(folder / "mask.png")
    return folder / "mask.png"


def test_the_values_of_a_mask(tmp_path):
    target = read_mask(mask(tmp_path, [[0, 1, 2], [255, 2, 0]]), (2, 3), 2)
    assert target.dtype == torch.long
    assert target.tolist() == [[BACKGROUND, 0, 1], [IGNORED, 1, BACKGROUND]]


def test_a_mask_with_a_palette_has_the_palettes_indices(tmp_path):
    picture = Image.fromarray(np.array([[0, 2]], np.uint8), mode="P")
    picture.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
    picture.save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png", (1, 2), 2).tolist() == [[BACKGROUND, 1]]


@pytest.mark.parametrize(
    ("values", "mode", "message"),
    [
        ([[0, 3]], "L", r"has the value 3; expected 0 to 2 \(background, classes\) or 255"),
        ([[0], [1]], "L", r"is \[2, 1\], its image \[1, 2\]; expected the same height and width"),
        ([[0, 1]], "RGB", "has mode RGB; expected 8 bits a pixel, grey or palette"),
    ],
)
def test_a_mask_of_something_else_is_refused(tmp_path, values, mode, message):
    with pytest.raises(DataError, match=message):
        read_mask(mask(tmp_path, values, mode), (1, 2), 2)


@pytest.mark.parametrize(
    ("coding", "expected"),
    [
        (MaskCoding(), [[BACKGROUND, 0, 1, IGNORED]]),
        (MaskCoding(background=False, ignored=(0, 255)), [[IGNORED, 0, 1, IGNORED]]),
        (MaskCoding(first=0, background=False), [[0, 1, 2, IGNORED]]),
    ],
)
def test_what_a_value_means_depends_on_the_data_set(tmp_path, coding, expected):
    assert read_mask(mask(tmp_path, [[0, 1, 2, 255]]), (1, 4), 3, coding).tolist() == expected


@pytest.mark.parametrize(
    ("coding", "value", "text"),
    [
        (MaskCoding(first=0, background=False), 2, r"has the value 2; expected 0 to 1 \(classes\) or 255"),
        (MaskCoding(background=False, ignored=(0,)), 255, r"has the value 255; expected 1 to 2 \(classes\) or 0"),
        (MaskCoding(background=False), 0, r"has the value 0; expected 1 to 2 \(classes\) or 255"),
    ],
)
def test_a_value_without_a_meaning_is_refused(tmp_path, coding, value, text):
    with pytest.raises(DataError, match=text):
        read_mask(mask(tmp_path, [[1, value]]), (1, 2), 2, coding)


def test_the_first_images_alone_with_their_captions(tmp_path):
    data = EvaluationData(["a", "b"], notes=["a note"])
    for number in range(3):
        image = data.add_image(Path(f"{number}.png"), Path(f"{number}-mask.png"), number % 2, (0, 0, 1, number + 1))
        for caption in range(number + 1):
            data.add_caption(image, f"{number}{caption}", hard_negative="x", group=f"g{number}")
    first = data.first(2)
    assert [path.name for path in first.images] == ["0.png", "1.png"]
    assert (first.captions, first.image_index) == (["00", "10", "11"], [0, 1, 1])
    assert (first.labels, first.crops[1], first.groups) == ([0, 1], (0, 0, 1, 2), ["g0", "g1", "g1"])
    assert (first.classes, first.notes) == (["a", "b"], ["a note"])
    assert len(data.images) == 3
    assert data.first(9) == data


def test_the_size_of_an_image_without_decoding_it(tmp_path):
    Image.new("L", (5, 3)).save(tmp_path / "image.png")
    assert read_image_size(tmp_path / "image.png") == (3, 5)
    (tmp_path / "broken.png").write_bytes(b"none")
    with pytest.raises(DataError, match=r"broken\.png cannot be read as an image"):
        read_image_size(tmp_path / "broken.png")
