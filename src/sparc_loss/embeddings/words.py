"""The words of a caption and the positions of their tokens in the tokenizer's output.

Tokenizers split a caption into pieces smaller than words; byte-level ones even split characters. Here every piece gets
its span in the caption, and the pieces of a word are collected. Importing this imports open_clip.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import regex
from open_clip.tokenizer import SimpleTokenizer, basic_clean, canonicalize_text
from torch import Tensor

from sparc_loss.embeddings.token_mask import hf_tokenizer_of, token_conventions

# Scripts without spaces between words: each character is a word, unless a piece holds several.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
# A run of letters, digits, their marks and apostrophes between them; otherwise a single character as a reader sees it.
_WORD = regex.compile(rf"[\w--[{_UNSPACED}]]+(?:['\u2019][\w--[{_UNSPACED}]]+)*|(?!\s)\X", regex.V1)


@dataclass(frozen=True)
class Word:
    """A word or a punctuation mark of a caption.

    Attributes:
        start: first character in `Caption.text`.
        stop: last character, exclusive.
        positions: of its tokens in the tokenizer's output; empty if the context ends before the word.
    """

    start: int
    stop: int
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Caption:
    """A caption as the model reads it.

    Attributes:
        text: the caption as the tokenizer cleans it: SimpleTokenizer converts it to lower case, for example.
        words: in their order, without those that the tokenizer drops (some drop punctuation).
    """

    text: str
    words: tuple[Word, ...]

    @property
    def read(self) -> tuple[Word, ...]:
        """The words with at least one token: all but those beyond the context."""
        return tuple(word for word in self.words if word.positions)

    def __getitem__(self, word: Word) -> str:
        """The word as written."""
        return self.text[word.start : word.stop]


@dataclass(frozen=True)
class _Piece:
    """A token and its span in the text; `position` is that in the tokenizer's output, None beyond the context."""

    token_id: int
    start: int
    stop: int
    position: int | None = None

    def overlaps(self, start: int, stop: int) -> bool:
        return start < self.stop and self.start < stop


def read_caption(caption: str, tokenizer: Any) -> Caption:
    """Find the words of a caption as a reader sees them, for a figure.

    Words are runs of letters and digits. A punctuation mark is a word, and so is a character of a script without
    spaces. A piece that spans several of these joins them into one word. A piece of white space belongs to no word.

    Args:
        caption: any text.
        tokenizer: from `open_clip.get_tokenizer`. With one that gives no spans (neither SimpleTokenizer nor around a
            fast Hugging Face tokenizer), only white space separates words.

    Raises:
        TypeError: an object that is not a tokenizer of open_clip.
        ValueError: no word in the caption, a tokenizer that drops or reorders pieces (`reduction_mask`), or one
            without spans that reads the beginning of the caption differently on its own.
    """
    text, pieces = _pieces(caption, tokenizer)
    words = _words(text, pieces)
    if not any(word.positions for word in words):
        raise ValueError(f"caption is {caption!r}; expected at least one word")
    return Caption(text, words)


def word_positions(tokenizer: Any, caption: str, ids: Tensor | None = None) -> list[list[int]]:
    """The positions of the tokens of each word of `caption.split()`, for annotations of these words.

    Punctuation belongs to the word it is attached to. The list is empty for a word that the tokenizer drops or that is
    beyond its context. A token that spans several words belongs to each of them.

    Args:
        tokenizer: as in `read_caption`.
        caption: words between white space.
        ids: what the tokenizer makes of the caption, [1, L], where that is known already.

    Raises:
        TypeError: as `read_caption`.
        ValueError: as `read_caption`, but for a caption without words; a tokenizer that cleans a word differently on
            its own.
    """
    if not caption.split():
        return []
    clean = _clean_of(tokenizer)
    text, pieces = _pieces(caption, tokenizer, ids)
    words = [clean(word) for word in caption.split()] if text != caption else caption.split()
    if " ".join(filter(None, words)) != text:
        raise ValueError(
            f"caption {caption!r} is cleaned to {text!r}, its words alone to {words}; expected a tokenizer that "
            "cleans each word independently of the others"
        )
    positions, start = [], 0
    for word in words:
        stop = start + len(word)
        own = [piece.position for piece in pieces if word and piece.overlaps(start, stop)]
        positions.append([position for position in own if position is not None])
        start = stop + bool(word)
    return positions


def _clean_of(tokenizer: Any) -> Callable[[str], str]:
    """The tokenizer's own cleaning of a text."""
    if hasattr(tokenizer, "clean_fn"):
        clean: Callable[[str], str] = tokenizer.clean_fn
        return clean
    if hf_tokenizer_of(tokenizer) is not None:  # SigLipTokenizer has no clean_fn and always uses this one
        return lambda text: str(canonicalize_text(basic_clean(text)))
    return lambda text: " ".join(text.split())


def _pieces(caption: str, tokenizer: Any, ids: Tensor | None = None) -> tuple[str, list[_Piece]]:
    """The cleaned caption, and the pieces of its words with their positions; `ids` are those of the caption."""
    conventions = token_conventions(tokenizer)
    hf_tokenizer = hf_tokenizer_of(tokenizer)
    text = _clean_of(tokenizer)(caption)
    if hf_tokenizer is not None and hf_tokenizer.is_fast:
        found = _hf_pieces(text, hf_tokenizer)
    elif isinstance(tokenizer, SimpleTokenizer):
        found = _simple_pieces(text, tokenizer)
    else:
        return text, _pieces_of_prefixes(text, tokenizer)
    pieces = [piece for piece in found if piece.token_id not in conventions.special_ids]

    # Beyond the context, the model reads the first pieces; a few tokenizers keep the last.
    texts = tokenizer([caption]) if ids is None else ids
    positions = conventions.mask(texts, "words")[0].nonzero().flatten().tolist()
    skipped = len(pieces) - len(positions) if getattr(hf_tokenizer, "truncation_side", "right") == "left" else 0
    seen = pieces[skipped : skipped + len(positions)]
    if skipped < 0 or [piece.token_id for piece in seen] != texts[0, positions].tolist():
        raise ValueError(
            f"tokenizer is a {type(tokenizer).__name__} that drops or reorders pieces of {caption!r}; "
            "expected one that keeps them, such as one without reduction_mask"
        )
    places = [None] * skipped + positions + [None] * (len(pieces) - skipped - len(seen))
    return text, [replace(piece, position=place) for piece, place in zip(pieces, places, strict=True)]


def _pieces_of_prefixes(text: str, tokenizer: Any) -> list[_Piece]:
    """The pieces of a tokenizer that gives no spans: the tokens that each word adds."""
    spans = [match.span() for match in regex.finditer(r"\S+", text)]
    if not spans:
        return []
    ids = tokenizer([text[:stop] for _, stop in spans])
    mask = token_conventions(tokenizer).mask(ids, "words")
    whole = mask[-1].nonzero().flatten().tolist()
    pieces: list[_Piece] = []
    for row, (start, stop) in enumerate(spans):
        count = int(mask[row].sum())
        if ids[row][mask[row]].tolist() != ids[-1][whole[:count]].tolist() or count < len(pieces):
            raise ValueError(
                f"caption {text!r}: its beginning {text[:stop]!r} is tokenized differently on its own; "
                "expected a tokenizer and a language that separate the words"
            )
        pieces += [_Piece(int(ids[-1][place]), start, stop, place) for place in whole[len(pieces) : count]]
    return pieces


def _words(text: str, pieces: list[_Piece]) -> tuple[Word, ...]:
    """The words that have pieces."""
    spans = [match.span() for match in _WORD.finditer(text)]
    joined = {
        (left, right)
        for piece in pieces
        for left, right in pairwise([span for span in spans if piece.overlaps(*span)])
    }
    whole: list[tuple[int, int]] = []
    for before, span in zip([None, *spans], spans, strict=False):
        if (before, span) in joined:
            span = (whole.pop()[0], span[1])
        whole.append(span)

    words = []
    for start, stop in whole:
        own = [piece.position for piece in pieces if piece.overlaps(start, stop)]
        if own:
            words.append(Word(start, stop, tuple(position for position in own if position is not None)))
    return tuple(words)


def _simple_pieces(text: str, tokenizer: Any) -> list[_Piece]:
    """The pieces of open_clip's SimpleTokenizer, as its `encode` makes them."""
    pieces = []
    for match in tokenizer.pat.finditer(text):
        # The character that each byte belongs to.
        owner = [match.start() + i for i, letter in enumerate(match.group()) for _ in letter.encode()]
        first = 0
        for piece in tokenizer.bpe("".join(map(tokenizer.byte_encoder.get, match.group().encode()))).split(" "):
            length = len(piece.removesuffix("</w>"))  # one letter per byte
            last = first + length - 1
            pieces.append(_Piece(tokenizer.encoder[piece], owner[first], owner[last] + 1))
            first += length
    return pieces


def _hf_pieces(text: str, hf_tokenizer: Any) -> list[_Piece]:
    encoded = hf_tokenizer(text, return_offsets_mapping=True, verbose=False)
    return [
        _Piece(token_id, start, stop)
        for token_id, (start, stop) in zip(encoded.input_ids, encoded.offset_mapping, strict=True)
    ]
