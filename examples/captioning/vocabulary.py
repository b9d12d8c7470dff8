"""Captions as numbers: whole words, so that the figures do not depend on the backbone's tokenizer."""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sparc_loss.evaluation.faithfulness import caption_words

PAD, START, END, UNKNOWN = range(4)
_SPECIAL = ("[PAD]", "[START]", "[END]", "[UNK]")


class Vocabulary:
    """The most frequent words of captions, in lower case and without punctuation, as CIDEr counts them.

    Args:
        captions: of training.
        size: how many words at most.
    """

    def __init__(self, captions: Iterable[str], size: int = 10_000) -> None:
        counts = Counter(word for caption in captions for word in caption_words(caption))
        # By the alphabet where frequencies are equal, so that the order of the captions does not matter.
        frequent = sorted(counts, key=lambda word: (-counts[word], word))[:size]
        self.words = [*_SPECIAL, *frequent]
        self._numbers = {word: number for number, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, captions: Sequence[str], length: int) -> Tensor:
        """Start, words and end of each caption, int64 [B, L], padded; captions are cut after `length` words."""
        rows = [self._row(caption_words(caption)[:length]) for caption in captions]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)

    def decode(self, ids: Tensor) -> list[str]:
        """The captions of int64 [B, L], without what is no word."""
        return [" ".join(self.words[number] for number in row if number > UNKNOWN) for row in ids.tolist()]

    def _row(self, words: list[str]) -> Tensor:
        return torch.tensor([START, *(self._numbers.get(word, UNKNOWN) for word in words), END])
