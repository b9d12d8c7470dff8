"""What a person might say of a scene: its objects by colour, kind and size, and how they stand to each other."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

MIN_WORDS, MAX_WORDS = 6, 25

SIZES_SAID = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
_OPENINGS = ("", "", "a picture of", "an image with", "here we see", "in this scene there is", "look at")
_CLOSINGS = ("", "", "", "on a noisy background", "on grainy paper", "in front of a cloudy wall")
_VERBS = ("is", "is", "sits", "stands", "appears")
_RELATIONS = {
    "left": ("left of", "to the left of", "on the left of"),
    "right": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "lower than"),
    "near": ("next to", "beside", "close to"),
}
_SIZE_SAID, _COLOUR_SAID, _NEAR_SAID = 0.4, 0.9, 0.4
_NEAR_PIXELS = 8


@dataclass(frozen=True)
class Mention:
    """An object to be named: kind, colour and size in words, box as (left, top, right, bottom) in pixels."""

    kind: str
    colour: str
    size: str
    box: tuple[int, int, int, int]


def phrase(*words: str) -> str:
    """`words` after the article that the first one takes: "a red seven", "an eight"."""
    return " ".join([_article(words[0]), *words])


def describe(mentions: Sequence[Mention], rng: np.random.Generator) -> tuple[str, list[dict[str, int]]]:
    """A caption that names every object once and says nothing false.

    Returns:
        The caption of 6 to 25 words, and per object what is said of it ("colour", "kind", "size") -> the index of
        that word in `caption.split()`. Punctuation stands at the end of words.
    """
    words: Words = []
    while not MIN_WORDS <= len(words) <= MAX_WORDS:
        words = _Teller(mentions, rng).tell()
    said: list[dict[str, int]] = [{} for _ in mentions]
    for index, word in enumerate(words):
        if word.number is not None:
            said[word.number][word.says] = index
    return " ".join(word.text for word in words), said


@dataclass(frozen=True)
class _Word:
    """A word of a caption and, if it says something of an object, which object and what."""

    text: str
    number: int | None = None
    says: str | None = None


Words = list[_Word]


class _Teller:
    """One attempt at a caption: how each object is named, in which order, by which sentence."""

    def __init__(self, mentions: Sequence[Mention], rng: np.random.Generator) -> None:
        self.mentions = mentions
        self.rng = rng
        self.order = rng.permutation(len(mentions)).tolist()
        self.names = [self.name(number) for number in range(len(mentions))]

    def tell(self) -> Words:
        sentences = [self.enumerate, self.relate, self.invert, self.point_back]
        if len(self.mentions) > 2:
            sentences.append(self.chain)
        return self.pick(sentences)()

    def enumerate(self) -> Words:
        """[a picture of] A, B and C [on a noisy background]"""
        return self.say(_OPENINGS) + _join([self.names[n] for n in self.order]) + self.say(_CLOSINGS)

    def relate(self) -> Words:
        """A is left of B[, with C and D]"""
        first, second, *rest = self.order
        return self.add(rest, self.names[first] + self.say(_VERBS) + self.relation(first, second) + self.names[second])

    def invert(self) -> Words:
        """left of B is A[, with C and D]"""
        first, second, *rest = self.order
        return self.add(rest, self.relation(first, second) + self.names[second] + self.say(_VERBS) + self.names[first])

    def point_back(self) -> Words:
        """[look at] A with B right of it[, with C and D]"""
        first, second, *rest = self.order
        words = self.say(_OPENINGS) + self.names[first] + _plain("with") + self.names[second]
        return self.add(rest, words + self.relation(second, first) + _plain("it"))

    def chain(self) -> Words:
        """A is left of B and above C[, with D]"""
        first, second, third, *rest = self.order
        words = self.names[first] + self.say(_VERBS) + self.relation(first, second) + self.names[second]
        return self.add(rest, words + _plain("and") + self.relation(first, third) + self.names[third])

    def add(self, rest: list[int], words: Words) -> Words:
        """`words`, and a mention of the objects still unnamed."""
        if not rest:
            return words
        before, after = self.pick([("with", ""), ("and there is", ""), ("and", "elsewhere"), ("and also", "")])
        return _comma(words) + _plain(before) + _join([self.names[n] for n in rest]) + _plain(after)

    def name(self, number: int) -> Words:
        """Article, perhaps the size, nearly always the colour, the kind."""
        mention, words = self.mentions[number], []
        if self.rng.random() < _SIZE_SAID:
            words.append(_Word(self.pick(SIZES_SAID[mention.size]), number, "size"))
        if self.rng.random() < _COLOUR_SAID:
            words.append(_Word(mention.colour, number, "colour"))
        words.append(_Word(mention.kind, number, "kind"))
        return [*_plain(_article(words[0].text)), *words]

    def relation(self, first: int, second: int) -> Words:
        """How one object stands to another: near, or by the axis along which they are further apart."""
        left, top, right, bottom = self.mentions[first].box
        other_left, other_top, other_right, other_bottom = self.mentions[second].box
        gap = max(other_left - right, left - other_right, other_top - bottom, top - other_bottom)
        across, down = left + right - other_left - other_right, top + bottom - other_top - other_bottom
        if gap <= _NEAR_PIXELS and self.rng.random() < _NEAR_SAID:
            relation = "near"
        elif abs(across) > abs(down):
            relation = "left" if across < 0 else "right"
        else:
            relation = "above" if down < 0 else "below"
        return self.say(_RELATIONS[relation])

    def say(self, choices: Sequence[str]) -> Words:
        return _plain(self.pick(choices))

    def pick(self, choices: Sequence):
        return choices[self.rng.integers(len(choices))]


def _join(names: list[Words]) -> Words:
    """A, B and C"""
    words = list(names[0])
    for name in names[1:-1]:
        words = _comma(words) + name
    return words + _plain("and") + names[-1] if len(names) > 1 else words


def _comma(words: Words) -> Words:
    return [*words[:-1], replace(words[-1], text=words[-1].text + ",")]


def _plain(text: str) -> Words:
    return [_Word(word) for word in text.split()]


def _article(word: str) -> str:
    return "an" if word in ("orange", "eight") else "a"
