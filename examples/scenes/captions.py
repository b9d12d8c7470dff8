"""What a person might say of a scene: the number, colour, kind and size of its objects, and how they stand."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .world import Group

Box = tuple[int, int, int, int]

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
_NUMBERS = ("no", "one", "two", "three", "four", "five")
_SIZE_SAID, _COLOUR_SAID, _NEAR_SAID = 0.4, 0.9, 0.4
_NEAR_PIXELS = 8


@dataclass(frozen=True)
class Mention:
    """Objects to be named: their size in words, and the box of each as (left, top, right, bottom) in pixels."""

    group: Group
    size: str
    boxes: tuple[Box, ...]


def phrase(*words: str) -> str:
    """`words` after the article that the first one takes: "a red seven", "an eight"."""
    return " ".join([article(words[0]), *words])


def describe(mentions: Sequence[Mention], rng: np.random.Generator) -> tuple[str, list[dict[str, int]]]:
    """A caption that names every mention once and says nothing false.

    Returns:
        The caption of 6 to 25 words, and per mention what is said of it ("colour", "kind", "size") -> the index of
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
        # Single objects first: only these stand somewhere to each other.
        order = rng.permutation(len(mentions)).tolist()
        self.order = sorted(order, key=lambda number: mentions[number].group.count > 1)
        self.singles = sum(mention.group.count == 1 for mention in mentions)
        self.names = [self.name(number) for number in range(len(mentions))]

    def tell(self) -> Words:
        sentences = [self.enumerate]
        if self.singles > 1:
            sentences += [self.relate, self.invert, self.point_back]
        if self.singles > 2:
            sentences.append(self.chain)
        return self.pick(sentences)()

    def enumerate(self) -> Words:
        """[a picture of] A, B and C [on a noisy background]"""
        opening = self.agree(self.pick(_OPENINGS), self.order[0])
        return opening + _join([self.names[n] for n in self.order]) + self.say(_CLOSINGS)

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
        return _comma(words) + self.agree(before, rest[0]) + _join([self.names[n] for n in rest]) + _plain(after)

    def name(self, number: int) -> Words:
        """Article or number, perhaps the size, nearly always the colour if there is one, the kind."""
        mention, words = self.mentions[number], []
        group = mention.group
        if self.rng.random() < _SIZE_SAID:
            words.append(_Word(self.pick(SIZES_SAID[mention.size]), number, "size"))
        if self.rng.random() < _COLOUR_SAID and group.colour:
            words.append(_Word(group.colour, number, "colour"))
        words.append(_Word(group.kind if group.count == 1 else group.plural, number, "kind"))
        return [*_plain(article(words[0].text) if group.count == 1 else _NUMBERS[group.count]), *words]

    def relation(self, first: int, second: int) -> Words:
        """How one single object stands to another: near, or by the axis along which they are further apart."""
        left, top, right, bottom = self.mentions[first].boxes[0]
        other_left, other_top, other_right, other_bottom = self.mentions[second].boxes[0]
        gap = max(other_left - right, left - other_right, other_top - bottom, top - other_bottom)
        across, down = left + right - other_left - other_right, top + bottom - other_top - other_bottom
        if gap <= _NEAR_PIXELS and self.rng.random() < _NEAR_SAID:
            relation = "near"
        elif abs(across) > abs(down):
            relation = "left" if across < 0 else "right"
        else:
            relation = "above" if down < 0 else "below"
        return self.say(_RELATIONS[relation])

    def agree(self, text: str, number: int) -> Words:
        """`text` before a mention, with "there are" where that is of several objects."""
        return _plain(text.replace("there is", "there are") if self.mentions[number].group.count > 1 else text)

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


def article(word: str) -> str:
    """ "a" or "an" before `word`."""
    return "an" if (word[0] in "aeio" and word != "one") or word == "umbrella" else "a"
