"""Faithfulness: how much of the caption retrieved for an image is confirmed by the image's own captions.

K-Precision is the share of the retrieved caption's words that occur in at least one of the image's own captions; its
nouns-and-adjectives form uses only these words (Bica et al., arXiv 2401.09865, Section 4; after Adlakha et al., arXiv
2307.16877). A retrieved caption may be another image's and still say nothing false.

Words are runs of letters and digits in lower case. Repeated words count each time.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparc_loss.evaluation.retrieval import caption_images

WordFilter = Callable[[str], bool] | Collection[str]


class KPrecision(NamedTuple):
    """K-Precision per image; `nanmean` is that of the data set.

    Attributes:
        precision: float64 [N], NaN where the retrieved caption has no such word.
        chance: float64 [N], its mean over all captions that could have been retrieved.
    """

    precision: Tensor
    chance: Tensor


def k_precision(
    captions: Sequence[str],
    retrieved: Tensor,
    image_index: Tensor | None = None,
    counts: WordFilter | None = None,
) -> KPrecision:
    """K-Precision of the caption retrieved for each image.

    Args:
        captions: M captions, of all images.
        retrieved: int64 [N], the caption retrieved for each image: `nearest_captions(...)`.
        image_index: int64 [M], the image of each caption; None is caption i to image i, with M = N.
        counts: which words count: a set of lower-case words, or a function that says so for one, such as a
            part-of-speech tagger's "noun or adjective"; None is all words.

    Raises:
        TypeError: `captions` a single string, `retrieved` or `image_index` not of int64.
        ValueError: shapes that disagree, a caption out of range, an image without a caption.
    """
    if isinstance(captions, str):
        raise TypeError("captions is a str; expected a sequence of captions")
    if not isinstance(retrieved, Tensor) or retrieved.dtype != torch.long or retrieved.ndim != 1:
        found = f"{retrieved.dtype} {list(retrieved.shape)}" if isinstance(retrieved, Tensor) else type(retrieved)
        raise TypeError(f"retrieved is {found}; expected a tensor of torch.int64 [N]")
    images = len(retrieved)
    if image_index is None and len(captions) != images:
        raise ValueError(f"captions has {len(captions)}, retrieved {images}; expected as many, or an image_index")
    image_of = caption_images(image_index, images, len(captions), retrieved.device).tolist()
    outside = [caption for caption in retrieved.tolist() if not 0 <= caption < len(captions)]
    if outside:
        raise ValueError(f"retrieved has the caption {outside[0]}; expected 0 to {len(captions) - 1}")

    said: list[set[str]] = [set() for _ in range(images)]
    for image, caption in zip(image_of, captions, strict=True):
        said[image].update(caption_words(caption))
    shares = [_shares(caption, counts) for caption in captions]
    # The mean share of each word over the captions. Chance is the sum over the words of the image's own captions.
    average: Counter[str] = Counter()
    for share in filter(None, shares):
        average.update(share)
    total = sum(map(bool, shares))
    precision = [_said(shares[caption], said[image]) for image, caption in enumerate(retrieved.tolist())]
    chance = [sum(average[word] for word in words) / total if total else torch.nan for words in said]
    return KPrecision(torch.tensor(precision, dtype=torch.float64), torch.tensor(chance, dtype=torch.float64))


def text_k_precision(text: str, captions: Sequence[str], counts: WordFilter | None = None) -> float:
    """K-Precision of one text, such as a generated caption: the share of its words that occur in `captions`.

    Args:
        text: not one of the captions.
        captions: of its image.
        counts: which words count, as in `k_precision`.

    Returns:
        A number in [0, 1], NaN for a text without such a word.

    Raises:
        TypeError: `captions` is a single string.
    """
    if isinstance(captions, str):
        raise TypeError("captions is a str; expected a sequence of captions")
    return _said(_shares(text, counts), {word for caption in captions for word in caption_words(caption)})


def caption_words(caption: str) -> list[str]:
    """The words of a caption in lower case, without punctuation; "snow-white" and "dog's" are one word each."""
    return re.findall(r"[^\W_]+(?:['\u2019-][^\W_]+)*", caption.lower())


def _said(shares: dict[str, float], words: Collection[str]) -> float:
    """The sum of the shares of those words; NaN where there are no shares."""
    return sum(share for word, share in shares.items() if word in words) if shares else torch.nan


def _shares(caption: str, counts: WordFilter | None) -> dict[str, float]:
    """The share of each selected word among those of the caption."""
    words = caption_words(caption)
    if counts is not None:
        counts = counts if callable(counts) else counts.__contains__
        words = [word for word in words if counts(word)]
    return {word: number / len(words) for word, number in Counter(words).items()}
