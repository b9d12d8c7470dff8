"""The words of a caption, each with the positions that its pieces take in the tokenizer's output.

Tokenizers cut a caption into pieces smaller than words, byte-level ones even into parts of characters. Here every
piece gets its stretch of the caption, and pieces that share a word come together again.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import regex
from open_clip.tokenizer import SimpleTokenizer, basic_clean, canonicalize_text

from sparc_loss.embeddings.token_mask import hf_tokenizer_of, token_conventions

# Written without spaces between words: each character is a word of its own, unless a piece holds several.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
# A run of letters, digits and their marks, apostrophes within; else a single character, as a reader counts them.
_WORD = regex.compile(rf"[\w--[{_UNSPACED}]]+(?:['\u2019][\w--[{_UNSPACED}]]+)*|(?!\s)\X", regex.V1)


@dataclass(frozen=True)
class Word:
    """A word or a punctuation mark of a caption.

    Attributes:
        start: where it begins in `Caption.text`.
        stop: where it ends, exclusive.
        positions: of its pieces in the tokenizer's output; none if the caption is cut before the word.
    """

    start: int
    stop: int
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Caption:
    """A caption as the model reads it.

    Attributes:
        text: what the tokenizer's cleaning left of it: SimpleTokenizer writes small letters, for example.
        words: in their order. What the tokenizer leaves out (some leave out punctuation) is no word.
    """

    text: str
    words: tuple[Word, ...]

    @property
    def read(self) -> tuple[Word, ...]:
        """The words that the model reads at least a piece of: all but those beyond its context."""
        return tuple(word for word in self.words if word.positions)

    def __getitem__(self, word: Word) -> str:
        """The word as written."""
        return self.text[word.start : word.stop]


@dataclass(frozen=True)
class _Piece:
    token_id: int
    start: int
    stop: int


def read_caption(caption: str, tokenizer: Any) -> Caption:
    """Find a caption's words among the pieces that an open_clip tokenizer makes of it.

    Words are runs of letters and digits; a punctuation mark, and a character of a script without spaces, stands for
    itself. Pieces that reach over several of these make them one word. A piece of white space alone belongs to none.

    Args:
        caption: any text.
        tokenizer: from `open_clip.get_tokenizer`: SimpleTokenizer, or one around a fast Hugging Face tokenizer.

    Raises:
        TypeError: another tokenizer, or a slow one, which does not tell where its pieces stand.
        ValueError: no word in the caption, or a tokenizer that drops or reorders pieces (`reduction_mask`).
    """
    conventions = token_conventions(tokenizer)
    texts = tokenizer([caption])
    positions = conventions.mask(texts, "words")[0].nonzero().flatten().tolist()
    hf_tokenizer = hf_tokenizer_of(tokenizer)
    if hf_tokenizer is None and not isinstance(tokenizer, SimpleTokenizer):
        raise TypeError(
            f"tokenizer is a {type(tokenizer).__name__}, which does not tell where its pieces stand; expected "
            "SimpleTokenizer, or one around a fast Hugging Face tokenizer"
        )
    # SigLipTokenizer has no clean_fn: it always does this.
    clean = getattr(tokenizer, "clean_fn", lambda text: canonicalize_text(basic_clean(text)))
    text = clean(caption)
    found = _simple_pieces(text, tokenizer) if hf_tokenizer is None else _hf_pieces(text, hf_tokenizer)
    pieces = [piece for piece in found if piece.token_id not in conventions.special_ids]

    # Where the context ends, the model reads the first pieces; few tokenizers keep the last.
    skipped = len(pieces) - len(positions) if getattr(hf_tokenizer, "truncation_side", "right") == "left" else 0
    seen = pieces[skipped : skipped + len(positions)]
    if skipped < 0 or [piece.token_id for piece in seen] != texts[0, positions].tolist():
        raise ValueError(
            f"tokenizer is a {type(tokenizer).__name__} that drops or reorders pieces of {caption!r}; "
            "expected one that keeps them, such as one without reduction_mask"
        )
    places = [None] * skipped + positions + [None] * (len(pieces) - skipped - len(seen))
    words = _words(text, pieces, places)
    if not any(word.positions for word in words):
        raise ValueError(f"caption is {caption!r}; expected at least one word")
    return Caption(text, words)


def _words(text: str, pieces: list[_Piece], places: list[int | None]) -> tuple[Word, ...]:
    """The words that have pieces; `places` are the pieces' positions, None beyond the context."""
    spans = [match.span() for match in _WORD.finditer(text)]
    joined = {
        (left, right)
        for piece in pieces
        for left, right in pairwise([span for span in spans if _overlap(span, piece)])
    }
    whole: list[tuple[int, int]] = []
    for before, span in zip([None, *spans], spans, strict=False):
        if (before, span) in joined:
            span = (whole.pop()[0], span[1])
        whole.append(span)

    words = []
    for start, stop in whole:
        own = [place for piece, place in zip(pieces, places, strict=True) if _overlap((start, stop), piece)]
        if own:
            words.append(Word(start, stop, tuple(place for place in own if place is not None)))
    return tuple(words)


def _overlap(span: tuple[int, int], piece: _Piece) -> bool:
    return span[0] < piece.stop and piece.start < span[1]


def _simple_pieces(text: str, tokenizer: Any) -> list[_Piece]:
    """The pieces of open_clip's SimpleTokenizer, as its `encode` makes them."""
    pieces = []
    for match in tokenizer.pat.finditer(text):
        # The character to which each byte belongs.
        owner = [match.start() + i for i, letter in enumerate(match.group()) for _ in letter.encode()]
        first = 0
        for piece in tokenizer.bpe("".join(map(tokenizer.byte_encoder.get, match.group().encode()))).split(" "):
            length = len(piece.removesuffix("</w>"))  # one letter per byte
            last = first + length - 1
            pieces.append(_Piece(tokenizer.encoder[piece], owner[first], owner[last] + 1))
            first += length
    return pieces


def _hf_pieces(text: str, hf_tokenizer: Any) -> list[_Piece]:
    if not hf_tokenizer.is_fast:
        raise TypeError(
            f"tokenizer is a slow one ({type(hf_tokenizer).__name__}), which does not tell where its pieces stand; "
            "expected a fast Hugging Face tokenizer"
        )
    encoded = hf_tokenizer(text, return_offsets_mapping=True, verbose=False)
    return [
        _Piece(token_id, start, stop)
        for token_id, (start, stop) in zip(encoded.input_ids, encoded.offset_mapping, strict=True)
    ]
