"""open_clip's training data with regions: what a loader gives for a CSV and for a WebDataset."""

import csv
import io
import json
import pickle
import tarfile
from argparse import Namespace

import numpy as np
import open_clip
import pytest
import torch
from open_clip_train.data import get_data
from open_clip_train.params import parse_args
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms as v1
from torchvision.tv_tensors import BoundingBoxes

from sparc_loss.embeddings.words import word_positions
from sparc_loss.named_objects import NamedObject, parse_objects
from sparc_loss.regions import region_mask
from sparc_loss.regions.behind_texts import RegionSizes, unpacked
from sparc_loss.regions.training_data import RegionSample, RegionTokenizer, _begin_each, data_with_regions

SIZES = RegionSizes(77, 77, (4, 4))
# Nothing is cropped, so that the boxes stay where they are.
TRANSFORM = v1.Compose([v1.RandomResizedCrop(32, scale=(1, 1), ratio=(1, 1)), v1.ToTensor()])
BOX = json.dumps([{"phrase": "a dog", "box": [0, 0, 16, 32], "words": [1]}])
ROWS = [
    ("a dog on a sofa", BOX),
    ("two cats", ""),
    ("the dogs!", json.dumps([{"phrase": "dogs", "box": [16, 16, 32, 32], "words": [1]}, *json.loads(BOX)])),
    ("a photo", json.dumps([{"phrase": "a photo", "box": [0, 0, 32, 32]}])),
]


@pytest.fixture(scope="module")
def tokenizer():
    return open_clip.get_tokenizer("ViT-B-32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The rows as a CSV and as shards."""
    folder = tmp_path_factory.mktemp("regions")
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    with open(folder / "train.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["filepath", "title", "boxes"])
        writer.writerows([folder / "image.png", caption, boxes] for caption, boxes in ROWS)
    write_shard(folder / "0.tar", folder, [{"boxes": json.loads(boxes)} if boxes else None for _, boxes in ROWS])
    return folder


def write_shard(path, folder, entries):
    with tarfile.open(path, "w") as file:
        for index, ((caption, _), entry) in enumerate(zip(ROWS, entries, strict=True)):
            members = {"png": (folder / "image.png").read_bytes(), "txt": caption.encode()}
            if entry is not None:
                members["json"] = entry if isinstance(entry, bytes) else json.dumps(entry).encode()
            for kind, content in members.items():
                info = tarfile.TarInfo(f"{index:03d}.{kind}")
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))


def arguments(*flags) -> Namespace:
    args = parse_args([*map(str, flags), "--batch-size", "4", "--workers", "0", "--train-num-samples", "4"])
    args.distributed, args.world_size, args.rank = False, 1, 0
    return args


def batch_of(args, tokenizer, words="all"):
    """The ids and masks of the only batch, by caption."""
    transforms = (TRANSFORM, TRANSFORM)
    data = data_with_regions(get_data, args, transforms, tokenizer, SIZES, 0.5, words, epoch=0)
    (batch,) = data["train"].dataloader
    texts = batch["text"] if isinstance(batch, dict) else batch[1]
    ids, masks = unpacked(texts, SIZES)
    return {
        tokenizer.decode(each[1 : int(each.argmax())].tolist()).strip(): (each, mask)
        for each, mask in zip(ids, masks, strict=True)
    }


def expected_mask(caption, boxes, tokenizer, words="all"):
    objects = parse_objects(boxes, caption) if boxes else ()
    found = BoundingBoxes(
        torch.tensor([each.box for each in objects]).reshape(-1, 4), format="XYXY", canvas_size=(32, 32)
    )
    places = word_positions(tokenizer, caption)
    positions = [[place for word in each.words for place in places[word]] for each in objects]
    return region_mask(found, positions, (4, 4), 77, words=words)


@pytest.mark.parametrize("words", ["all", "only"])
@pytest.mark.parametrize("data", ["train.csv", "0.tar"])
def test_each_text_has_the_mask_of_its_own_boxes_behind_it(folder, tokenizer, data, words):
    found = batch_of(arguments("--train-data", folder / data), tokenizer, words)
    assert len(found) == len(ROWS)
    for caption, boxes in ROWS:
        ids, mask = found[tokenizer.decode(tokenizer.encode(caption)).strip()]
        assert torch.equal(ids, tokenizer([caption])[0])
        assert torch.equal(mask, expected_mask(caption, boxes, tokenizer, words))


@pytest.mark.filterwarnings("ignore::pandas.errors.ParserWarning")
def test_a_row_without_its_last_field_is_trained_without_boxes(folder, tokenizer, tmp_path):
    """pandas reads it as missing where the separator is a pattern."""
    _, boxes = next(row for row in ROWS if row[1])
    image = folder / "image.png"
    rows = ["filepath::title::boxes", f"{image}::a dog::{boxes}", *[f"{image}::a cat"] * 3]
    (tmp_path / "short.csv").write_text("\n".join(rows), encoding="utf-8")
    args = arguments("--train-data", tmp_path / "short.csv", "--csv-separator", "::")
    assert torch.equal(batch_of(args, tokenizer)["a cat"][1], expected_mask("a cat", "", tokenizer))


def test_validation_texts_stay_as_they_are(folder, tokenizer):
    args = arguments("--train-data", folder / "train.csv", "--val-data", folder / "train.csv")
    data = data_with_regions(get_data, args, (TRANSFORM, TRANSFORM), tokenizer, SIZES, 0.5, "all", epoch=0)
    for split, width in (("val", 77), ("train", 77 + SIZES.packed), ("val", 77)):
        (batch,) = data[split].dataloader
        assert (batch["text"] if isinstance(batch, dict) else batch[1]).shape == (4, width)


def test_the_images_are_open_clips_own(folder, tokenizer):
    args = arguments("--train-data", folder / "train.csv")
    transform = v1.Compose([v1.RandomResizedCrop(32, scale=(0.2, 1)), v1.ToTensor()])
    images = []
    for make in (get_data, lambda *given, **named: data_with_regions(get_data, *given, **named)):
        settings = {} if make is get_data else {"sizes": SIZES, "share": 0.5, "words": "all"}
        torch.manual_seed(0)
        data = make(args, (transform, transform), tokenizer=tokenizer, epoch=0, **settings)
        (batch,) = data["train"].dataloader
        images.append(batch["image"] if isinstance(batch, dict) else batch[0])
    assert torch.equal(*images)


class TestReaderOfBoxes:
    """A stage of the WebDataset pipeline. A CSV is checked before training begins; shards cannot be."""

    def begun(self, tokenizer, *samples):
        """The objects that each sample begins with."""
        sample = RegionSample(TRANSFORM, tokenizer, SIZES, 0.5, "all")
        return [sample.objects for _ in _begin_each(sample, iter(samples))]

    @pytest.mark.parametrize("decoded", [True, False], ids=["decoded", "raw"])
    def test_takes_the_boxes_of_each_samples_json(self, tokenizer, decoded):
        entry = {"boxes": json.loads(BOX), "caption": "more"}
        first = {"json": entry if decoded else json.dumps(entry).encode()}
        assert self.begun(tokenizer, first, {}, {"json": b"{}"}, {"json": b"[]"}) == [
            (NamedObject("a dog", (0, 0, 16, 32), (1,)),),
            (),
            (),
            (),
        ]

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            (b"{not json", "Expecting property name"),
            ({"boxes": [{"phrase": "a dog", "box": [5, 5, 5, 5]}]}, "a box is empty"),
            ({"boxes": 3}, "boxes is '3'"),
        ],
        ids=["JSON", "box", "list"],
    )
    def test_what_cannot_be_read_is_trained_without_boxes(self, tokenizer, caplog, entry, message):
        place = {"__url__": "0.tar", "__key__": "007"}
        assert self.begun(tokenizer, {**place, "json": entry}) == [()]
        assert message in caplog.text
        assert "0.tar, sample 007: " in caplog.text
        assert caplog.text.rstrip().endswith("it is trained without boxes")


class TestSample:
    OBJECTS = (NamedObject("a dog", (0, 0, 16, 32), (1,)),)

    @pytest.mark.parametrize("text_first", [True, False])
    def test_takes_image_and_text_in_any_order(self, tokenizer, text_first):
        sample = RegionSample(TRANSFORM, tokenizer, SIZES, 0.5, "all")
        image = Image.new("RGB", (32, 32))
        sample.begin(self.OBJECTS)
        if text_first:
            text = RegionTokenizer(sample)(["a dog on a sofa"])[0]
            sample.transformed(image)
        else:
            sample.transformed(image)
            text = RegionTokenizer(sample)("a dog on a sofa")[0]
        _, mask = unpacked(text[None], SIZES)
        assert torch.equal(mask[0], expected_mask("a dog on a sofa", BOX, tokenizer))

    def test_a_caption_that_its_words_cannot_be_found_in_is_trained_without_boxes(
        self, tokenizer, monkeypatch, caplog
    ):
        def fails(*_):
            raise ValueError("expected a tokenizer that cleans each word independently")

        monkeypatch.setattr("sparc_loss.regions.training_data.word_positions", fails)
        sample = RegionSample(TRANSFORM, tokenizer, SIZES, 0.5, "all")
        sample.begin(self.OBJECTS)
        sample.transformed(Image.new("RGB", (32, 32)))
        _, mask = unpacked(sample.tokenized(["a dog"]), SIZES)
        assert mask.all()
        assert "the boxes of the caption 'a dog' are left out of training: expected a tokenizer" in caplog.text

    def test_words_beyond_the_context_are_left_out(self, tokenizer):
        sample = RegionSample(TRANSFORM, tokenizer, SIZES, 0.5, "all")
        sample.begin((NamedObject("dog", (0, 0, 16, 32), (99,)),))
        sample.transformed(Image.new("RGB", (32, 32)))
        _, mask = unpacked(sample.tokenized(["word " * 99 + "dog"]), SIZES)
        assert mask.all()

    def test_can_be_sent_to_a_worker_process(self, tokenizer):
        sample = RegionSample(TRANSFORM, tokenizer, SIZES, 0.5, "all")
        copy = pickle.loads(pickle.dumps(RegionTokenizer(sample)))
        assert torch.equal(copy(["a dog"]), tokenizer(["a dog"]))

    def test_the_tokenizer_has_the_attributes_of_its_own(self, tokenizer):
        sample = RegionSample(TRANSFORM, tokenizer, SIZES, 0.5, "all")
        assert RegionTokenizer(sample).context_length == tokenizer.context_length


def test_other_data_is_refused(tokenizer):
    data = {"train": Namespace(dataloader=DataLoader([1, 2]))}
    message = "the training data is a DataLoader of a list; expected a CSV or a WebDataset with boxes"
    with pytest.raises(ValueError, match=message):
        data_with_regions(lambda *_, **__: data, None, (TRANSFORM, TRANSFORM), tokenizer, SIZES, 0.5, "all")
