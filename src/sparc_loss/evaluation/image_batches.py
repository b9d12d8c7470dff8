"""Batches of images, read and preprocessed by worker processes whose failures become one line of error."""

import multiprocessing.queues
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sparc_loss.evaluation.dataset import DataError, read_image
from sparc_loss.model_loading import preprocessing_of


class ImageBatch(NamedTuple):
    """Images as a worker sends them: in two tensors, because each tensor takes a file descriptor.

    Attributes:
        indices: of the B images.
        images: [B, 3, H, W], as the model's own preprocessing shows them.
        whole: [B, 3, H, W], squashed; the same tensor where the model's own preprocessing squashes.
        sizes: height and width of the files' images.
    """

    indices: list[int]
    images: Tensor
    whole: Tensor
    sizes: tuple[tuple[int, int], ...]


class _Images(Dataset[Any]):
    """Batches of images by their indices. Errors are returned: a raised one would print the worker's traceback."""

    def __init__(self, model: Any, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.squash = preprocessing_of(model, resize_mode="squash")
        squashes = model.visual.preprocess_cfg.get("resize_mode") == "squash"
        self.preprocess = None if squashes else preprocessing_of(model)

    def __getitem__(self, indices: list[int]) -> ImageBatch | DataError:
        try:
            images, whole, sizes = zip(*[self._read(self.paths[index]) for index in indices], strict=True)
            squashed = torch.stack(whole)
            return ImageBatch(indices, squashed if self.preprocess is None else torch.stack(images), squashed, sizes)
        except DataError as error:
            return error
        except Exception as error:
            return unreadable(error)

    def _read(self, path: Path) -> tuple[Tensor | None, Tensor, tuple[int, int]]:
        try:
            image = read_image(path)
            own = None if self.preprocess is None else self.preprocess(image)
            return own, self.squash(image), (image.height, image.width)
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def image_batches(model: Any, paths: Sequence[Path], batch_size: int, workers: int) -> Iterator[ImageBatch]:
    # In a fixed random order: neighbours in a file may resemble each other, and the probe swaps neighbours.
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0)).tolist()
    starts = range(0, len(order), batch_size)
    loader = DataLoader(
        _Images(model, paths),
        batch_size=None,
        sampler=[order[start : start + batch_size] for start in starts],
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_send_errors,
    )
    batches = None
    try:
        batches = iter(loader)
        for batch in tqdm(batches, desc="images", unit="batch", total=len(loader)):
            if isinstance(batch, DataError):
                raise batch
            yield batch
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
    """In a worker: send the error if a batch cannot be sent. Python would drop it, and the command would wait."""

    def send(queue: multiprocessing.queues.Queue, error: Exception, item: tuple[int, Any]) -> None:
        queue.put((item[0], unreadable(error)))

    setattr(multiprocessing.queues.Queue, "_on_queue_feeder_error", send)  # noqa: B010 (untyped)


def unreadable(error: Exception) -> DataError:
    if isinstance(error.__cause__, RuntimeError):
        error = error.__cause__  # PyTorch's "killed by signal", before its "exited unexpectedly"
    return DataError(
        f"the images cannot be read: {type(error).__name__}: {str(error).strip()}; a smaller --batch-size and fewer "
        "--workers take less memory, less shared memory (/dev/shm) and fewer open files"
    )
