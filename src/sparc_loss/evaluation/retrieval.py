"""Retrieval: how often the right caption is among the k nearest of an image, and the right image among a caption's."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from sparc_loss._validation import check_features

# Two cosines closer than this tie: float32 rounding may put equal ones in either order.
TIE = 1e-6

_CHUNK = 1024


class Recall(NamedTuple):
    """Recall@k as a share of the queries, both ways."""

    image_to_text: float
    text_to_image: float


def recall_at_k(image_features: Tensor, text_features: Tensor, k: int = 1) -> Recall:
    """Share of the queries whose counterpart is among the k nearest by cosine similarity.

    A tie never counts in favour: candidates as near as the right one are ranked before it, so a model that maps
    everything to one point scores 0.

    Args:
        image_features: floating point [N, D], normalised or not.
        text_features: floating point [N, D]; row i belongs to image i.
        k: 1 to N.

    Raises:
        TypeError: features that are not floating-point tensors, or k that is not an int.
        ValueError: shapes or devices that disagree, values that are not finite, no pairs, k outside 1 to N.
    """
    check_features("n d, n d", image_features=image_features, text_features=text_features)
    _check_k(k, len(image_features))
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        if not features.isfinite().all():
            raise ValueError(f"{name} has values that are not finite; expected finite ones")
    images, texts = (F.normalize(features.float(), dim=-1) for features in (image_features, text_features))
    return Recall(_recall(images, texts, k), _recall(texts, images, k))


def recall_chance(count: int, k: int = 1) -> float:
    """Recall@k of a random order of `count` candidates: k / count.

    Raises:
        ValueError: k outside 1 to count.
    """
    _check_k(k, count)
    return k / count


def _recall(queries: Tensor, candidates: Tensor, k: int) -> float:
    hits = 0
    for start in range(0, len(queries), _CHUNK):
        chunk = queries[start : start + _CHUNK]
        similarity = chunk @ candidates.T
        right = similarity.diagonal(offset=start).unsqueeze(1)
        # The right candidate is always one of those it counts.
        rank = (similarity >= right - TIE).sum(dim=1)
        hits += int((rank <= k).sum())
    return hits / len(queries)


def _check_k(k: int, count: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k is {k!r} ({type(k).__name__}); expected an int")
    if not 1 <= k <= count:
        raise ValueError(f"k is {k} with {count} candidates; expected 1 to the number of candidates")
