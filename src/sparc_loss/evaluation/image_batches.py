"""Batches of images, read and preprocessed by worker processes whose failures become one line of error."""

import multiprocessing.queues
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as F
from tqdm import tqdm

from sparc_loss.evaluation.dataset import DataError, EvaluationData, read_image, read_mask
from sparc_loss.evaluation.protocol import Protocol
from sparc_loss.model_loading import preprocessing_of
from sparc_loss.named_objects import Box


class ImageBatch(NamedTuple):
    """Images as a worker sends them: in two tensors, because each tensor takes a file descriptor.

    Attributes:
        indices: of the B images.
        images: [B, 3, H, W], as the model's own preprocessing shows them; None if not asked for.
        whole: [B, 3, H, W], squashed; the same tensor where the model's own preprocessing squashes; None if not
            asked for.
        sizes: height and width of the files' images, or of their crops.
    """

    indices: list[int]
    images: Tensor | None
    whole: Tensor | None
    sizes: tuple[tuple[int, int], ...]


class ResizedImage(NamedTuple):
    """An image for segmentation in windows.

    Attributes:
        image: [3, h, w], its short side that of the protocol, normalised as the model wants it.
        target: int64 [H, W], the classes of the file's pixels, as `read_mask` returns them.
    """

    image: Tensor
    target: Tensor


class _Readings(Dataset[Any]):
    """What is read of the images, by their indices. Errors are returned: a raised one would print a traceback."""

    def read(self, indices: list[int]) -> Any:
        raise NotImplementedError

    def __getitem__(self, indices: list[int]) -> Any:
        try:
            return self.read(indices)
        except DataError as error:
            return error
        except Exception as error:
            return unreadable(error)


class _Images(_Readings):
    def __init__(self, model: Any, paths: Sequence[Path], crops: Sequence[Box | None], own: bool, whole: bool) -> None:
        self.paths, self.crops = paths, crops
        squashes = model.visual.preprocess_cfg.get("resize_mode") == "squash"
        self.one_for_both = own and whole and squashes
        self.squash = preprocessing_of(model, resize_mode="squash") if whole else None
        self.preprocess = preprocessing_of(model) if own and not self.one_for_both else None

    def read(self, indices: list[int]) -> ImageBatch:
        images, whole, sizes = zip(*map(self._read, indices), strict=True)
        squashed = torch.stack(whole) if self.squash else None
        own = torch.stack(images) if self.preprocess else None
        return ImageBatch(indices, squashed if self.one_for_both else own, squashed, sizes)

    def _read(self, index: int) -> tuple[Tensor | None, Tensor | None, tuple[int, int]]:
        path = self.paths[index]
        with _named(path):
            image = read_image(path)
            crop = self.crops[index] if self.crops else None
            if crop is not None:
                left, top, right, bottom = crop
                image = image.crop((left, top, right, bottom))
            own = self.preprocess(image) if self.preprocess else None
            return own, self.squash(image) if self.squash else None, (image.height, image.width)


class _ResizedImages(_Readings):
    def __init__(self, model: Any, data: EvaluationData, protocol: Protocol) -> None:
        self.data, self.protocol = data, protocol
        # What open_clip does after it has resized and cropped: the last steps of its own preprocessing.
        resize, *_, self.to_tensor, self.normalize = preprocessing_of(model, resize_mode="squash").transforms  # type: ignore[attr-defined]
        self.interpolation = resize.interpolation

    def read(self, indices: list[int]) -> ResizedImage:
        (index,) = indices
        path, mask = self.data.images[index], self.data.masks[index]
        assert mask is not None
        with _named(path):
            image = read_image(path).convert("RGB")
            size = (image.height, image.width)
            target = read_mask(mask, size, len(self.data.classes), self.data.mask_coding)
            resized = F.resize(image, list(self.protocol.image_size(size)), self.interpolation)
            return ResizedImage(self.normalize(self.to_tensor(resized)), target)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors name the file."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def image_batches(
    model: Any,
    paths: Sequence[Path],
    batch_size: int,
    workers: int,
    crops: Sequence[Box | None] = (),
    *,
    own: bool = True,
    whole: bool = True,
    order: Sequence[int] | None = None,
) -> Iterator[ImageBatch]:
    """The images in batches, preprocessed.

    Args:
        model: whose preprocessing it is.
        paths: of the images.
        batch_size: B.
        workers: processes that read.
        crops: see `EvaluationData`.
        own: give the images as the model's own preprocessing shows them.
        whole: give the images squashed, so that all of each is seen.
        order: the indices of the images, as often as each is to come; None is each once, in a fixed random order:
            neighbours in a file may resemble each other, and the probe of image dependence swaps them.

    Raises:
        DataError: an image that cannot be read.
    """
    if order is None:
        order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0)).tolist()
    starts = range(0, len(order), batch_size)
    batches = [list(order[start : start + batch_size]) for start in starts]
    yield from _read_batches(_Images(model, paths, crops, own, whole), batches, workers)


def resized_images(model: Any, data: EvaluationData, protocol: Protocol, workers: int) -> Iterator[ResizedImage]:
    """The images that have a mask, one by one, in the order of the data."""
    indices = [[index] for index, mask in enumerate(data.masks) if mask is not None]
    yield from _read_batches(_ResizedImages(model, data, protocol), indices, workers)


def _read_batches(readings: _Readings, batches_of_indices: list[list[int]], workers: int) -> Iterator[Any]:
    loader = DataLoader(
        readings,
        batch_size=None,
        sampler=batches_of_indices,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_send_errors,
    )
    batches = None
    try:
        batches = iter(loader)
        with tqdm(desc="images", unit="image", total=sum(map(len, batches_of_indices))) as progress:
            for indices, batch in zip(batches_of_indices, batches, strict=True):
                if isinstance(batch, DataError):
                    raise batch
                yield batch
                progress.update(len(indices))
    except Exception as error:
        death = _end_workers(batches) if batches is not None and workers else None
        if isinstance(error, DataError):
            raise
        raise unreadable(death or error) from error


def _end_workers(batches: Any) -> RuntimeError | None:
    """Shut the workers down; returns the error by which PyTorch reports a dead worker, which may come late."""
    try:
        batches._shutdown_workers()
    except RuntimeError as death:
        return death
    return None


def _as_it_is(batch: Any) -> Any:
    return batch


def _send_errors(_: int) -> None:
    """In a worker: send the error if a batch cannot be sent. Python would drop it, and the command would wait.

    The thread that hands batches over says nothing when the command ends meanwhile; it would print a traceback.
    """

    def send(queue: multiprocessing.queues.Queue, error: Exception, item: tuple[int, Any]) -> None:
        queue.put((item[0], unreadable(error)))

    sys.excepthook = lambda *_: None
    setattr(multiprocessing.queues.Queue, "_on_queue_feeder_error", send)  # noqa: B010 (untyped)


@contextmanager
def worker_errors() -> Iterator[None]:
    """Around the use of batches: PyTorch raises the death of a worker wherever this process is."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise unreadable(error) from error


def unreadable(error: Exception) -> DataError:
    if isinstance(error.__cause__, RuntimeError):
        error = error.__cause__  # PyTorch's "killed by signal", before its "exited unexpectedly"
    return DataError(
        f"the images cannot be read: {type(error).__name__}: {str(error).strip()}; a smaller --batch-size and fewer "
        "--workers take less memory, less shared memory (/dev/shm) and fewer open files"
    )
