"""What each suite reads of a made data set in its real layout."""

import pytest
import suite_trees
from suite_trees import NAMES, SIZES, TREES

from sparc_loss.evaluation.dataset import IGNORED, read_mask
from sparc_loss.evaluation.segmentation import BACKGROUND
from sparc_loss.evaluation.suites import SUITES, DataFolder
from sparc_loss.named_objects import NamedObject


def read(name, tmp_path):
    TREES[name](tmp_path)
    return SUITES[name].read(DataFolder(tmp_path, SUITES[name]))


@pytest.mark.parametrize(
    ("suite", "classes", "labels"),
    [
        ("voc20", 20, {IGNORED, 0, 19}),  # background and borders are ignored
        ("voc21", 20, {BACKGROUND, 0, IGNORED, 19}),
        ("context59", 59, {IGNORED, 0, 58}),
        ("context60", 59, {BACKGROUND, 0, 58}),
        ("coco-stuff", 171, {0, 170, IGNORED}),  # the first class has the value 0
        ("coco-object", 80, {BACKGROUND, 0, 79}),
        ("cityscapes", 19, {0, 18, IGNORED}),
        ("ade20k", 150, {IGNORED, 0, 149}),  # 0 is ignored
    ],
)
def test_masks_and_classes(tmp_path, suite, classes, labels):
    data = read(suite, tmp_path)[""]
    assert len(data.classes) == classes == len(set(data.classes))
    assert all(len(protocol.classes) == classes for protocol in SUITES[suite].protocols.values())
    for mask, size in zip(data.masks, SIZES, strict=False):
        assert set(read_mask(mask, size, classes, data.mask_coding).unique().tolist()) == labels


def test_voc_reads_its_split_in_order(tmp_path):
    assert [path.stem for path in read("voc20", tmp_path)[""].images] == list(NAMES)


@pytest.mark.parametrize(("suite", "folder"), [("coco", "coco/val2014"), ("flickr30k", "flickr30k/flickr30k-images")])
def test_captions_of_karpathys_test_split(tmp_path, suite, folder):
    data = read(suite, tmp_path)[""]
    # Of 12 images of the split, one has no caption; the first has six, of which five are used.
    assert [path.name for path in data.images] == [f"{number}.jpg" for number in range(12) if number != 2]
    assert data.images[0] == tmp_path / folder / "0.jpg"
    assert data.captions[:5] == [f"scene 0 of {suite}, caption {each}" for each in range(5)]
    assert [len(captions) for captions in data.captions_of()] == [5] * 11
    assert data.notes == ["left out: 1 without a caption"]


def test_sugarcrepes_subsets_apart(tmp_path):
    parts = read("sugarcrepe", tmp_path)
    assert list(parts) == ["add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj"]
    data = parts["swap_obj"]
    assert len(data.images) == 3
    assert data.image_index == [0, 1, 2, 0]
    assert (data.captions[3], data.hard_negatives[3]) == ("a swap_obj scene 3", "a wrong swap_obj scene 3")


def test_aros_rows_with_their_boxes_and_groups(tmp_path):
    parts = read("aro", tmp_path)
    relation, attribution = parts["relation"], parts["attribution"]
    assert relation.crops == [(5, 3, 25, 33)] * 3
    assert relation.groups == ["on", "on", "behind"]
    assert (relation.captions[2], relation.hard_negatives[2]) == ("the cat behind mat 2", "the mat behind cat 2")
    # A pair of attributes with fewer than 25 rows is in no group.
    assert attribution.groups == [None, *["white_long"] * 25]
    path = tmp_path / "aro" / "visual_genome_relation.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"behind"', '"next to"'), encoding="utf-8")
    # Nor is a relation that the authors leave out.
    assert SUITES["aro"].read(DataFolder(tmp_path, SUITES["aro"]))["relation"].groups == ["on", "on", None]


def test_imagenets_labels_are_the_places_of_the_sorted_folders(tmp_path):
    data = read("imagenet", tmp_path)[""]
    assert data.labels == [0, 1, 999]
    assert (len(data.classes), data.classes[0], data.classes[-1]) == (1000, "tench", "toilet paper")


def test_phrases_of_flickr30k_entities_with_their_boxes(tmp_path):
    data = read("flickr30k-entities", tmp_path)[""]
    assert data.captions[:2] == ["A man rides a red bike in the street .", "It is him ."]
    # Files count pixels from 1, and the last pixel is part of the box.
    man, bike = (2, 4, 20, 30), (9, 9, 24, 40)
    assert data.objects[0] == (NamedObject("A man", man, (0, 1)), NamedObject("a red bike", bike, (3, 4, 5)))
    assert data.objects[1] == (NamedObject("him", man, (2,)),)
    assert data.notes == ["4 of 10 phrases have no box and are left out"]


def test_a_phrase_with_several_boxes_has_them_all(tmp_path):
    suite_trees.flickr30k_entities(tmp_path)
    path = tmp_path / "flickr30k_entities/Annotations/1016887272.xml"
    corners = "<xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax>"
    second = f"<object><name>1</name><name>2</name><bndbox>{corners}</bndbox></object>"
    path.write_text(
        path.read_text(encoding="utf-8").replace("</annotation>", f"{second}</annotation>"), encoding="utf-8"
    )
    data = SUITES["flickr30k-entities"].read(DataFolder(tmp_path, SUITES["flickr30k-entities"]))[""]
    boxes = {each.phrase: [] for each in data.objects[0]}
    for each in data.objects[0]:
        boxes[each.phrase].append(each.box)
    assert boxes == {"A man": [(2, 4, 20, 30), (0, 0, 2, 2)], "a red bike": [(9, 9, 24, 40), (0, 0, 2, 2)]}


def test_images_of_sugarcrepe_may_lie_where_coco_stuff_has_them(tmp_path):
    suite_trees.sugarcrepe(tmp_path)
    (tmp_path / "coco_stuff164k/images").mkdir(parents=True)
    (tmp_path / "coco/val2017").rename(tmp_path / "coco_stuff164k/images/val2017")
    data = SUITES["sugarcrepe"].read(DataFolder(tmp_path, SUITES["sugarcrepe"]))["add_att"]
    assert data.images[0].parent == tmp_path / "coco_stuff164k/images/val2017"
