"""Retrieval: how often the right caption is among the k nearest of an image, and the right image among a caption's.

An image may have several captions, as in COCO: any of them is right for it, and they do not compete with each other.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparc_loss._checks import check_features
from sparc_loss._nearest import TIE

# Maximum number of similarities in memory (64 MB), and of queries at a time.
_SIMILARITIES, _CHUNK = 1 << 24, 1024


class Recall(NamedTuple):
    """Recall@k as a share of the queries, both ways."""

    image_to_text: float
    text_to_image: float


def recall_at_k(
    image_features: Tensor, text_features: Tensor, k: int = 1, image_index: Tensor | None = None
) -> Recall:
    """Share of the queries whose counterpart is among the k nearest by cosine similarity.

    In a tie, wrong candidates are ranked before the right one, so a model that maps everything to one point scores 0.
    Of an image's captions, the nearest is used.

    Args:
        image_features: floating point [N, D], normalised or not.
        text_features: floating point [M, D].
        k: 1 to N.
        image_index: int64 [M], the image of each caption; None is caption i to image i, with M = N.

    Raises:
        TypeError: features that are not floating-point tensors, k that is not an int, an image_index not of int64.
        ValueError: shapes or devices that disagree, values that are not finite, no pairs, k outside 1 to N, an image
            without a caption.
    """
    images, texts, image_index = _normalised_pairs(image_features, text_features, image_index)
    check_k(k, len(images))
    own = torch.arange(len(images), device=images.device)
    return Recall(
        image_to_text=_recall(images, texts, own, image_index, k),
        text_to_image=_recall(texts, images, image_index, own, k),
    )


def recall_chance(count: int, k: int = 1, right: int = 1) -> float:
    """Recall@k of a random order of `count` candidates, `right` of which are right: k / count where one is.

    Raises:
        ValueError: k or right outside 1 to count.
    """
    check_k(k, count)
    if not 1 <= right <= count:
        raise ValueError(f"right is {right} with {count} candidates; expected 1 to the number of candidates")
    return 1 - math.comb(count - right, k) / math.comb(count, k)


def nearest_captions(image_features: Tensor, text_features: Tensor, image_index: Tensor | None = None) -> Tensor:
    """The caption nearest to each image by cosine similarity, int64 [N]; a tie goes to another image's caption.

    Arguments and errors as in `recall_at_k`.
    """
    images, texts, image_index = _normalised_pairs(image_features, text_features, image_index)
    nearest, chunk = [], queries_at_a_time(len(texts))
    for start in range(0, len(images), chunk):
        similarity = images[start : start + chunk] @ texts.T
        tied = similarity >= similarity.amax(dim=1, keepdim=True) - TIE
        own = image_index == torch.arange(start, start + len(similarity), device=images.device).unsqueeze(1)
        nearest.append((tied.int() * 2 - own.int()).argmax(dim=1))
    return torch.cat(nearest)


def caption_images(image_index: Tensor | None, images: int, captions: int, device: torch.device) -> Tensor:
    """`image_index`, checked; 0, 1, 2 ... where it is None."""
    if image_index is None:
        return torch.arange(images, device=device)
    if not isinstance(image_index, Tensor) or image_index.dtype != torch.long:
        found = (
            f"dtype {image_index.dtype}" if isinstance(image_index, Tensor) else f"type {type(image_index).__name__}"
        )
        raise TypeError(f"image_index has {found}; expected a tensor of torch.int64")
    if image_index.shape != (captions,) or image_index.device != device:
        raise ValueError(
            f"image_index has shape {list(image_index.shape)} on {image_index.device}; "
            f"expected one image per caption, [{captions}] on {device}"
        )
    named = image_index.unique().tolist()
    if named != list(range(images)):
        wrong = next(iter(sorted(set(range(images)).symmetric_difference(named))))
        problem = f"gives image {wrong} no caption" if 0 <= wrong < images else f"names image {wrong}"
        raise ValueError(f"image_index {problem}; expected each of the images 0 to {images - 1} at least once")
    return image_index


def _normalised_pairs(
    image_features: Tensor, text_features: Tensor, image_index: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    axes = "n d, n d" if image_index is None else "n d, m d"
    check_features(axes, image_features=image_features, text_features=text_features)
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        if not features.isfinite().all():
            raise ValueError(f"{name} has values that are not finite; expected finite ones")
    image_index = caption_images(image_index, len(image_features), len(text_features), image_features.device)
    return F.normalize(image_features.float(), dim=-1), F.normalize(text_features.float(), dim=-1), image_index


def _recall(queries: Tensor, candidates: Tensor, query_image: Tensor, candidate_image: Tensor, k: int) -> float:
    hits, chunk = 0, queries_at_a_time(len(candidates))
    for start in range(0, len(queries), chunk):
        similarity = queries[start : start + chunk] @ candidates.T
        is_right = query_image[start : start + chunk].unsqueeze(1) == candidate_image
        right = similarity.masked_fill(~is_right, -torch.inf).amax(dim=1, keepdim=True)
        better = (similarity >= right - TIE) & ~is_right
        hits += int((better.sum(dim=1) < k).sum())
    return hits / len(queries)


def queries_at_a_time(candidates: int) -> int:
    """Number of queries to compare with all candidates at a time, so that memory has a bound."""
    return max(1, min(_CHUNK, _SIMILARITIES // candidates))


def check_k(k: int, count: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k is {k!r} ({type(k).__name__}); expected an int")
    if not 1 <= k <= count:
        raise ValueError(f"k is {k} with {count} candidates; expected 1 to the number of candidates")
