"""The objects that a caption names, and where they are: the column `boxes` of a CSV, or the JSON of a sample."""

import json
import math
from dataclasses import dataclass
from typing import Any

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels of the file, right and bottom exclusive."""


@dataclass(frozen=True)
class NamedObject:
    """An object of a caption: what it is called, its box in pixels, the words of `caption.split()` that name it."""

    phrase: str
    box: Box
    words: tuple[int, ...] = ()


def parse_objects(text: str, caption: str | None) -> tuple[NamedObject, ...]:
    """The objects of a caption, as JSON: [{"phrase": text, "box": [left, top, right, bottom], "words": [0, 1]}, ...].

    Args:
        text: the JSON; `words` may be missing.
        caption: None if it is not known yet, so that words may be beyond its end.

    Raises:
        ValueError: anything else, an empty box, or words beyond the caption; one line with the text.
    """
    try:
        return tuple(_object(entry, None if caption is None else len(caption.split())) for entry in json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"boxes is {str(text)[:80]!r} ({type(error).__name__}: {error}); "
            'expected a JSON list of {"phrase": text, "box": [left, top, right, bottom]}'
        ) from error


def _object(entry: dict[str, Any], length: int | None) -> NamedObject:
    phrase, (left, top, right, bottom) = entry["phrase"], map(float, entry["box"])
    if not isinstance(phrase, str) or not phrase.strip():
        raise ValueError("a phrase is not a text")
    if not all(map(math.isfinite, (left, top, right, bottom))):
        raise ValueError("a box is not finite")
    if not (left < right and top < bottom):
        raise ValueError("a box is empty")
    words = tuple(entry.get("words", ()))
    if not all(type(word) is int and 0 <= word < (word + 1 if length is None else length) for word in words):
        last = "" if length is None else f", 0 to {length - 1}"
        raise ValueError(f"words are not positions in title.split(){last}")
    if not entry.keys() <= {"phrase", "box", "words"}:
        raise ValueError("an unknown key")
    return NamedObject(phrase, (left, top, right, bottom), words)
