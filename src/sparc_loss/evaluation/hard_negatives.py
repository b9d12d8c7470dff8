"""Hard negatives: does an image prefer its caption to one in which the objects' attributes are swapped?

"a red seven left of a blue star" against "a blue seven left of a red star": the same words, another scene. After
Yuksekgonul et al., "When and why vision-language models behave like bags-of-words" (ICLR 2023, arXiv 2210.01936).
"""

import re

import torch.nn.functional as F
from torch import Tensor

from sparc_loss._checks import check_features
from sparc_loss._nearest import TIE

# Of two captions, a guess is right half of the time.
HARD_NEGATIVE_CHANCE = 0.5

_ARTICLES = ("a", "an")


def hard_negative_accuracy(image_features: Tensor, text_features: Tensor, negative_features: Tensor) -> float:
    """Share of the images whose cosine is higher with the true caption than with the swapped one; a tie is a miss.

    So a model that sees only which words occur, not their order, scores 0 and not chance.

    Args:
        image_features: floating point [N, D], normalised or not.
        text_features: floating point [N, D], the true captions.
        negative_features: floating point [N, D], the swapped ones.

    Raises:
        TypeError: features that are not floating-point tensors.
        ValueError: shapes or devices that disagree, values that are not finite, no image.
    """
    features = {
        "image_features": image_features,
        "text_features": text_features,
        "negative_features": negative_features,
    }
    check_features("n d, n d, n d", **features)
    if len(image_features) == 0:
        raise ValueError(f"image_features has shape {list(image_features.shape)}; expected at least one image")
    for name, values in features.items():
        if not values.isfinite().all():
            raise ValueError(f"{name} has values that are not finite; expected finite ones")
    images, true, swapped = (F.normalize(values.float(), dim=-1) for values in features.values())
    margin = (images * true).sum(dim=-1) - (images * swapped).sum(dim=-1)
    return (margin > TIE).float().mean().item()


def swap_words(caption: str, first: int, second: int) -> str:
    """The caption with two words exchanged; punctuation stays in its place.

    If "a" or "an" precedes both, the articles are exchanged as well, so that a wrong article does not reveal the
    negative.

    Args:
        caption: words between white space.
        first: position in `caption.split()`.
        second: position of the other word.

    Raises:
        ValueError: a position outside the caption, or both the same.

    Example:
        >>> swap_words("An orange seven, left of a red star.", 1, 6)
        'A red seven, left of an orange star.'
    """
    words = caption.split()
    for name, position in (("first", first), ("second", second)):
        if not 0 <= position < len(words):
            raise ValueError(f"{name} is {position}; expected a word of the caption, 0 to {len(words) - 1}")
    if first == second:
        raise ValueError(f"first and second are both {first}; expected two words")
    _exchange(words, first, second)
    before = (first - 1, second - 1)
    if all(position >= 0 and words[position].lower() in _ARTICLES for position in before):
        _exchange(words, *before)
    return " ".join(words)


def _exchange(words: list[str], first: int, second: int) -> None:
    """Exchange two words in place; punctuation and capital letters stay where they are."""
    parts = [re.findall(r"^(\W*)(.*?)(\W*)$", words[position])[0] for position in (first, second)]
    for position, (before, word, after), (_, other, _) in zip((first, second), parts, reversed(parts), strict=True):
        initial = other[:1].upper() if word[:1].isupper() else other[:1].lower()
        words[position] = before + initial + other[1:] + after
