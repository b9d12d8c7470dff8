"""Aligned pairs with weights made by hand."""

import numpy as np
import torch

from sparc_loss.embeddings.words import Caption, Word
from sparc_loss.show import AlignedPair

# Two rows of three patches, each 8 pixels high and 10 wide.
WEIGHTS = [
    [[0.5, 0.25, 0.0], [0.0, 0.25, 0.0]],
    [[0.0, 0.0, 0.2], [0.0, 0.0, 0.8]],
    [[0.25, 0.25, 0.0], [0.25, 0.25, 0.0]],
]


def pair(
    text: str = "red dog!", words: tuple[str, ...] = ("red", "dog", "!"), read: int | None = None, **fields
) -> AlignedPair:
    """A white image; the words of `text` in their order, of which the model reads the first `read`."""
    found, stop = [], 0
    for index, word in enumerate(words):
        start = text.index(word, stop)
        stop = start + len(word)
        found.append(Word(start, stop, (index,) if read is None or index < read else ()))
    caption = Caption(text, tuple(found))
    weights = torch.tensor(WEIGHTS)[torch.arange(len(caption.read)) % 3]
    return AlignedPair(caption, np.full((16, 30, 3), 255, np.uint8), weights, (8, 10), **fields)
