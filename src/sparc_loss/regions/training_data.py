"""open_clip's training data with the regions of its captions: CSV and WebDataset.

open_clip transforms an image and tokenizes its text one sample after the other, but not in the same order in all its
versions. A `RegionSample` knows the objects of the sample at hand. It stands in for both the transform and the
tokenizer, and packs the mask behind the text as soon as it has seen both.
"""

import functools
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparc_loss.embeddings.words import word_positions
from sparc_loss.evaluation.pairs_csv import read_table
from sparc_loss.named_objects import NamedObject, parse_objects
from sparc_loss.regions.behind_texts import RegionSizes, packed
from sparc_loss.regions.joint_transform import JointTransform, boxes_of
from sparc_loss.regions.mask import RegionWords, region_mask

COLUMN = "boxes"

logger = logging.getLogger(__name__)


class RegionSample:
    """The sample at hand of a data set in a process.

    Nothing that is wrong with the boxes of a sample ends the training: it then trains without them, with a warning.

    Args:
        transform: of training images, from open_clip.
        tokenizer: from open_clip.
        sizes: of texts and masks.
        share: see `region_mask`.
        words: see `region_mask`.

    Raises:
        ValueError: as `JointTransform`.
    """

    def __init__(self, transform: Any, tokenizer: Any, sizes: RegionSizes, share: float, words: RegionWords) -> None:
        self.transform, self.joint = transform, JointTransform(transform)
        self.tokenizer = tokenizer
        self.sizes, self.share, self.words = sizes, share, words
        nothing = region_mask(boxes_of([], None), [], sizes.grid, sizes.length, words=words)
        self.without_boxes = packed(nothing)
        self.boxes = boxes_of([], None)
        self.begin(())
        self.begun = False

    def begin(self, objects: tuple[NamedObject, ...]) -> None:
        """The next image and the next text belong together, and have these objects."""
        self.begun, self.objects, self.has_image = True, objects, False
        self.row: Tensor | None = None
        self.caption = ""

    def transformed(self, image: Any) -> Any:
        """The image as training takes it."""
        if not self.objects:
            return self.transform(image)
        result, self.boxes = self.joint(image, boxes_of([each.box for each in self.objects], image))
        self.has_image = True
        self._pack()
        return result

    def tokenized(self, texts: Any, *arguments: Any, **named: Any) -> Tensor:
        """The ids [1, ids] of a text, with the mask behind them; the ids alone of texts that belong to no sample."""
        row: Tensor = self.tokenizer(texts, *arguments, **named)
        if not self.begun:
            return row
        row = torch.cat([row, self.without_boxes[None]], dim=1)
        if self.objects:
            self.caption = texts if isinstance(texts, str) else texts[0]
            self.row = row
            self._pack()
        else:
            self.begun = False
        return row

    def _pack(self) -> None:
        """Write the mask behind the text, once both image and text have been seen."""
        if self.row is None or not self.has_image:
            return
        # In place: the sample has this row already.
        self.row[0, self.sizes.ids :] = self._packed_mask(self.row[:, : self.sizes.ids])
        self.begin(())
        self.begun = False

    def _packed_mask(self, ids: Tensor) -> Tensor:
        try:
            words = word_positions(self.tokenizer, self.caption, ids)
            positions = [[place for word in each.words for place in words[word]] for each in self.objects]
            sizes = self.sizes
            mask = region_mask(
                self.boxes,
                positions,
                sizes.grid,
                sizes.length,
                share=self.share,
                words=self.words,
                extent=sizes.extent,
            )
            return packed(mask)
        except (ValueError, IndexError) as error:
            logger.warning(f"the boxes of the caption {self.caption!r} are left out of training: {error}")
            return self.without_boxes


class RegionTokenizer:
    """The tokenizer of a `RegionSample`, with the attributes of its own."""

    def __init__(self, sample: RegionSample) -> None:
        self.sample = sample

    def __call__(self, texts: Any, *arguments: Any, **named: Any) -> Tensor:
        """As `RegionSample.tokenized`."""
        return self.sample.tokenized(texts, *arguments, **named)

    def __getattr__(self, name: str) -> Any:
        if name == "sample":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.sample.tokenizer, name)


class DatasetWithRegions(Dataset):
    """A `CsvDataset` of open_clip, and the column `boxes` of its rows, as an array."""

    def __init__(self, dataset: Any, boxes: Any, sample: RegionSample) -> None:
        self.dataset, self.boxes, self.sample = dataset, boxes, sample

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """What open_clip's data set gives, with the mask behind the text."""
        text = self.boxes[index]
        try:
            objects = parse_objects(text, None) if text else ()
        except ValueError as error:
            logger.warning(f"row {index + 1} of the training data: {error}; it is trained without boxes")
            objects = ()
        self.sample.begin(objects)
        return self.dataset[index]


def data_with_regions(
    get_data: Callable[..., dict[str, Any]],
    args: Any,
    transforms: tuple[Any, Any],
    tokenizer: Any,
    sizes: RegionSizes,
    share: float,
    words: RegionWords,
    **others: Any,
) -> dict[str, Any]:
    """The data of open_clip's `get_data`, with the masks of their regions behind the texts of training.

    Raises:
        ValueError: as `JointTransform`; training data that is neither a CSV nor a WebDataset.
    """
    of_training, of_validation = transforms
    sample = RegionSample(of_training, tokenizer, sizes, share, words)
    data = get_data(args, (sample.transformed, of_validation), tokenizer=RegionTokenizer(sample), **others)
    loader = data["train"].dataloader
    if isinstance(loader, webdataset.WebLoader):
        _insert_reader_of_boxes(loader.pipeline[0].dataset.pipeline, sample)
    elif isinstance(loader, DataLoader) and type(loader.dataset).__name__ == "CsvDataset":
        table = read_table(args.train_data, args.csv_separator, usecols=[COLUMN], dtype=str, keep_default_na=False)
        boxes = table[COLUMN].fillna("").array  # the last field of a row may be missing
        # torch refuses to set the data set of a loader, because a sampler may know another; here it stays as long.
        object.__setattr__(loader, "dataset", DatasetWithRegions(loader.dataset, boxes, sample))
    else:
        found = f"{type(loader).__name__} of a {type(loader.dataset).__name__}"
        raise ValueError(f"the training data is a {found}; expected a CSV or a WebDataset with boxes")
    return data


def _insert_reader_of_boxes(pipeline: list[Any], sample: RegionSample) -> None:
    """Before the members of a sample are renamed, when its JSON is still there."""
    renaming = [place for place, stage in enumerate(pipeline) if getattr(stage, "f", None) is webdataset.rename.f]
    if len(renaming) != 1:
        raise ValueError(
            f"open_clip's WebDataset pipeline has {len(renaming)} stages that rename the members of a sample; "
            "expected one, before which the boxes of a sample are read"
        )
    pipeline.insert(renaming[0], functools.partial(_begin_each, sample))


def _begin_each(sample: RegionSample, samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for each in samples:
        try:
            objects = _objects_of(each.get("json"))
        except ValueError as error:
            place = f"{each.get('__url__')}, sample {each.get('__key__')}"
            logger.warning(f"{place}: {error}; it is trained without boxes")
            objects = ()
        sample.begin(objects)
        yield each


def _objects_of(entry: Any) -> tuple[NamedObject, ...]:
    """The objects in the `json` of a sample: its entry "boxes", as in the column of a CSV."""
    if isinstance(entry, (bytes, str)):
        entry = json.loads(entry)
    boxes = entry.get(COLUMN) if isinstance(entry, dict) else None
    return parse_objects(json.dumps(boxes), None) if boxes else ()
