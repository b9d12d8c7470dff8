"""Which positions of a tokenized caption count: by hand, for every convention that open_clip's tokenizers have."""

import sys
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import open_clip.tokenizer
import pytest
import tiny_tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from major_version import MAJOR_VERSION
from open_clip.tokenizer import SimpleTokenizer
from tiny_tokenizers import CONTEXT, WORDS

from sparc_loss.embeddings.token_mask import TokenConventions, token_conventions
from sparc_loss.embeddings.words import read_caption, word_positions

simple_tokenizer = lru_cache(partial(SimpleTokenizer, context_length=CONTEXT))


def mask(tokenizer: Any, caption: str, tokens: str) -> str:
    """The mask of one caption: 1 for what counts, . for what does not."""
    (row,) = token_conventions(tokenizer).mask(tokenizer([caption]), tokens)
    return "".join("1" if counts else "." for counts in row)


# SimpleTokenizer: START words END, padded with 0, which is also a "!" with another sign right after it.


SIMPLE = [
    ("a red dog", ".111....", "11111..."),
    ("", "........", "11......"),
    ("!", ".1......", "111....."),
    ("dog !$ dog", ".1111...", "111111.."),
    # Cut to the context, END in the last place.
    ("one two three four five six seven eight nine", ".111111.", "11111111"),
    # Exactly as long as the context.
    ("one two three four five six", ".111111.", "11111111"),
    ("!$ !$ !$ !$ !$", ".111111.", "11111111"),
]


@pytest.mark.parametrize("reduction", ["", "simple", "random", "shuffle"])
@pytest.mark.parametrize("clean", ["lower", "whitespace"])
@pytest.mark.parametrize(("caption", "words", "everything"), SIMPLE)
def test_simple_tokenizer(clean: str, reduction: str, caption: str, words: str, everything: str) -> None:
    tokenizer = simple_tokenizer(clean=clean, reduction_mask=reduction)
    assert mask(tokenizer, caption, "words") == words
    assert mask(tokenizer, caption, "all") == everything


@pytest.mark.parametrize(
    ("caption", "words", "everything"),
    [("A red dog.", ".111....", "11111..."), ("!", "........", "11......"), ("dog !$ dog", ".11.....", "1111....")],
)
def test_simple_tokenizer_that_cleans_punctuation_away(caption: str, words: str, everything: str) -> None:
    tokenizer = simple_tokenizer(clean="canonicalize")
    assert mask(tokenizer, caption, "words") == words
    assert mask(tokenizer, caption, "all") == everything


@pytest.mark.parametrize(("caption", "words", "everything"), [case for case in SIMPLE if case[0]])
def test_simple_tokenizer_that_reduces_by_syntax(
    monkeypatch: pytest.MonkeyPatch, caption: str, words: str, everything: str
) -> None:
    # nltk's two functions need data that is downloaded. (open_clip's own part fails on an empty caption.)
    nltk = SimpleNamespace(
        tokenize=SimpleNamespace(word_tokenize=str.split),
        pos_tag=lambda words: [(word, "JJ" if word == "red" else "NN") for word in words],
    )
    monkeypatch.setitem(sys.modules, "nltk", nltk)
    monkeypatch.setattr(open_clip.tokenizer, "_nltk_init", True)
    tokenizer = simple_tokenizer(reduction_mask="syntax")
    assert mask(tokenizer, caption, "words") == words
    assert mask(tokenizer, caption, "all") == everything


def test_additional_special_tokens_are_no_words() -> None:
    tokenizer = simple_tokenizer(additional_special_tokens=("<extra>",))
    assert mask(tokenizer, "a <extra> dog", "words") == ".1.1...."
    assert mask(tokenizer, "a <extra> dog", "all") == "11111..."


def test_an_exclamation_mark_can_have_the_id_of_padding() -> None:
    assert simple_tokenizer()(["dog !$ dog"])[0].tolist()[2] == 0


def test_every_caption_of_a_batch_has_its_own_length() -> None:
    tokenizer = simple_tokenizer()
    counts = token_conventions(tokenizer).mask(tokenizer(["dog", "", "a red dog !"]), "words")
    assert counts.dtype == torch.bool
    assert counts.sum(dim=1).tolist() == [1, 0, 4]


# Hugging Face tokenizers, by the models of open_clip that have them. What they make of a caption is written out too
# (_ is a space before a piece), so that the masks below can be read off it.

HUGGING_FACE: dict[str, Callable[[Path], Any]] = {
    "BERT": tiny_tokenizers.bert,
    "BERT, padded left": partial(tiny_tokenizers.bert, padding_side="left"),
    "CLIPA": partial(tiny_tokenizers.bert, strip_sep_token=True),
    "CLIPS": partial(tiny_tokenizers.bert, tokenizer_mode="clips", bos_token="[BOS]", eos_token="[EOS]"),
    "RoBERTa": tiny_tokenizers.roberta,
    "XLM-RoBERTa": tiny_tokenizers.xlm_roberta,
    "T5": tiny_tokenizers.t5,
    "mT5": partial(tiny_tokenizers.t5, clean="canonicalize"),
    "NLLB": tiny_tokenizers.nllb,
    "NLLB, legacy": partial(tiny_tokenizers.nllb, legacy=True),
    "SigLIP": partial(tiny_tokenizers.siglip, clean="canonicalize"),
    "SigLIP, padded left": partial(tiny_tokenizers.siglip, clean="canonicalize", padding_side="left"),
    "SigLipTokenizer": tiny_tokenizers.siglip_of_old,
    "SigLIP 2": partial(tiny_tokenizers.gemma, clean="canonicalize"),
    "GPT-2": tiny_tokenizers.gpt2,
    "GPT-2, padded left": partial(tiny_tokenizers.gpt2, padding_side="left"),
}
# An ordinary caption, an empty one, one with "!", with an unknown word, as long as the context, longer.
LONGER = "a red dog runs ! a red dog runs"
CASES: dict[str, list[tuple[str, str, str, str]]] = {
    "BERT": [
        ("a red dog", "[CLS] a red dog [SEP] [PAD] [PAD] [PAD]", ".111....", "11111..."),
        ("", "[CLS] [SEP] [PAD] [PAD] [PAD] [PAD] [PAD] [PAD]", "........", "11......"),
        ("dog ! dogs!", "[CLS] dog ! dog ##s ! [SEP] [PAD]", ".11111..", "1111111."),
        ("a z dog", "[CLS] a [UNK] dog [SEP] [PAD] [PAD] [PAD]", ".111....", "11111..."),
        ("a red dog runs a dog", "[CLS] a red dog runs a dog [SEP]", ".111111.", "11111111"),
        (LONGER, "[CLS] a red dog runs ! a [SEP]", ".111111.", "11111111"),
    ],
    "BERT, padded left": [
        ("a red dog", "[PAD] [PAD] [PAD] [CLS] a red dog [SEP]", "....111.", "...11111"),
        ("", "[PAD] [PAD] [PAD] [PAD] [PAD] [PAD] [CLS] [SEP]", "........", "......11"),
        ("dog ! dogs!", "[PAD] [CLS] dog ! dog ##s ! [SEP]", "..11111.", ".1111111"),
        ("a z dog", "[PAD] [PAD] [PAD] [CLS] a [UNK] dog [SEP]", "....111.", "...11111"),
        ("a red dog runs a dog", "[CLS] a red dog runs a dog [SEP]", ".111111.", "11111111"),
        (LONGER, "[CLS] a red dog runs ! a [SEP]", ".111111.", "11111111"),
    ],
    # The separator is written over with 0, which is BERT's padding.
    "CLIPA": [
        ("a red dog", "[CLS] a red dog [PAD] [PAD] [PAD] [PAD]", ".111....", "1111...."),
        ("", "[CLS] [PAD] [PAD] [PAD] [PAD] [PAD] [PAD] [PAD]", "........", "1......."),
        ("dog ! dogs!", "[CLS] dog ! dog ##s ! [PAD] [PAD]", ".11111..", "111111.."),
        ("a z dog", "[CLS] a [UNK] dog [PAD] [PAD] [PAD] [PAD]", ".111....", "1111...."),
        ("a red dog runs a dog", "[CLS] a red dog runs a dog [PAD]", ".111111.", "1111111."),
        (LONGER, "[CLS] a red dog runs ! a [PAD]", ".111111.", "1111111."),
    ],
    "CLIPS": [
        ("a red dog", "[BOS] a red dog [EOS] [PAD] [PAD] [CLS]", ".111....", "11111..1"),
        ("", "[BOS] [EOS] [PAD] [PAD] [PAD] [PAD] [PAD] [CLS]", "........", "11.....1"),
        ("dog ! dog!", "[BOS] dog ! dog ! [EOS] [PAD] [CLS]", ".1111...", "111111.1"),
        ("a z dog", "[BOS] a [UNK] dog [EOS] [PAD] [PAD] [CLS]", ".111....", "11111..1"),
        ("a red dog runs a", "[BOS] a red dog runs a [EOS] [CLS]", ".11111..", "11111111"),
        (LONGER, "[BOS] a red dog runs ! [EOS] [CLS]", ".11111..", "11111111"),
    ],
    "RoBERTa": [
        ("a red dog", "<s> a _red _dog </s> <pad> <pad> <pad>", ".111....", "11111..."),
        ("", "<s> </s> <pad> <pad> <pad> <pad> <pad> <pad>", "........", "11......"),
        ("dog ! dogs!", "<s> dog _! _dog s ! </s> <pad>", ".11111..", "1111111."),
        ("a z dog", "<s> a _ z _dog </s> <pad> <pad>", ".1111...", "111111.."),
        ("a red dog runs a dog", "<s> a _red _dog _runs _a _dog </s>", ".111111.", "11111111"),
        (LONGER, "<s> a _red _dog _runs _! _a </s>", ".111111.", "11111111"),
    ],
    "XLM-RoBERTa": [
        ("a red dog", "<s> _a _red _dog </s> <pad> <pad> <pad>", ".111....", "11111..."),
        ("", "<s> </s> <pad> <pad> <pad> <pad> <pad> <pad>", "........", "11......"),
        ("dog ! dogs!", "<s> _dog _! _dog s ! </s> <pad>", ".11111..", "1111111."),
        ("a z dog", "<s> _a _ <unk> _dog </s> <pad> <pad>", ".1111...", "111111.."),
        ("a red dog runs a dog", "<s> _a _red _dog _runs _a _dog </s>", ".111111.", "11111111"),
        (LONGER, "<s> _a _red _dog _runs _! _a </s>", ".111111.", "11111111"),
    ],
    "T5": [
        ("a red dog", "_a _red _dog </s> <pad> <pad> <pad> <pad>", "111.....", "1111...."),
        ("", "</s> <pad> <pad> <pad> <pad> <pad> <pad> <pad>", "........", "1......."),
        ("dog ! dogs!", "_dog _! _dog s ! </s> <pad> <pad>", "11111...", "111111.."),
        ("a z dog", "_a _ <unk> _dog </s> <pad> <pad> <pad>", "1111....", "11111..."),
        ("a red dog runs a red dog", "_a _red _dog _runs _a _red _dog </s>", "1111111.", "11111111"),
        (LONGER, "_a _red _dog _runs _! _a _red </s>", "1111111.", "11111111"),
    ],
    "mT5": [
        ("a red dog", "_a _red _dog </s> <pad> <pad> <pad> <pad>", "111.....", "1111...."),
        ("", "</s> <pad> <pad> <pad> <pad> <pad> <pad> <pad>", "........", "1......."),
        ("dog ! dogs!", "_dog _dog s </s> <pad> <pad> <pad> <pad>", "111.....", "1111...."),
        ("a z dog", "_a _ <unk> _dog </s> <pad> <pad> <pad>", "1111....", "11111..."),
        ("a red dog runs a red dog", "_a _red _dog _runs _a _red _dog </s>", "1111111.", "11111111"),
        (LONGER, "_a _red _dog _runs _a _red _dog </s>", "1111111.", "11111111"),
    ],
    "NLLB": [
        ("a red dog", "eng_Latn _a _red _dog </s> <pad> <pad> <pad>", ".111....", "11111..."),
        ("", "eng_Latn </s> <pad> <pad> <pad> <pad> <pad> <pad>", "........", "11......"),
        ("dog ! dogs!", "eng_Latn _dog _! _dog s ! </s> <pad>", ".11111..", "1111111."),
        ("a z dog", "eng_Latn _a _ <unk> _dog </s> <pad> <pad>", ".1111...", "111111.."),
        ("a red dog runs a dog", "eng_Latn _a _red _dog _runs _a _dog </s>", ".111111.", "11111111"),
        (LONGER, "eng_Latn _a _red _dog _runs _! _a </s>", ".111111.", "11111111"),
    ],
    "NLLB, legacy": [
        ("a red dog", "_a _red _dog </s> eng_Latn <pad> <pad> <pad>", "111.....", "11111..."),
        ("", "</s> eng_Latn <pad> <pad> <pad> <pad> <pad> <pad>", "........", "11......"),
        ("dog ! dogs!", "_dog _! _dog s ! </s> eng_Latn <pad>", "11111...", "1111111."),
        ("a z dog", "_a _ <unk> _dog </s> eng_Latn <pad> <pad>", "1111....", "111111.."),
        ("a red dog runs a dog", "_a _red _dog _runs _a _dog </s> eng_Latn", "111111..", "11111111"),
        (LONGER, "_a _red _dog _runs _! _a </s> eng_Latn", "111111..", "11111111"),
    ],
    # The end is also the padding: the one next to the words is the end.
    "SigLIP": [
        ("a red dog", "_a _red _dog </s> </s> </s> </s> </s>", "111.....", "1111...."),
        ("", "</s> </s> </s> </s> </s> </s> </s> </s>", "........", "1......."),
        ("dog ! dogs!", "_dog _dog s </s> </s> </s> </s> </s>", "111.....", "1111...."),
        ("a z dog", "_a _ <unk> _dog </s> </s> </s> </s>", "1111....", "11111..."),
        ("a red dog runs a red dog", "_a _red _dog _runs _a _red _dog </s>", "1111111.", "11111111"),
        (LONGER, "_a _red _dog _runs _a _red _dog </s>", "1111111.", "11111111"),
    ],
    "SigLIP, padded left": [
        ("a red dog", "</s> </s> </s> </s> _a _red _dog </s>", "....111.", "....1111"),
        ("", "</s> </s> </s> </s> </s> </s> </s> </s>", "........", ".......1"),
        ("dog ! dogs!", "</s> </s> </s> </s> _dog _dog s </s>", "....111.", "....1111"),
        ("a z dog", "</s> </s> </s> _a _ <unk> _dog </s>", "...1111.", "...11111"),
        ("a red dog runs a red dog", "_a _red _dog _runs _a _red _dog </s>", "1111111.", "11111111"),
        (LONGER, "_a _red _dog _runs _a _red _dog </s>", "1111111.", "11111111"),
    ],
    "SigLIP 2": [
        ("a red dog", "a _red _dog <eos> <pad> <pad> <pad> <pad>", "111.....", "1111...."),
        ("", "<eos> <pad> <pad> <pad> <pad> <pad> <pad> <pad>", "........", "1......."),
        ("dog ! dogs!", "dog _dog s <eos> <pad> <pad> <pad> <pad>", "111.....", "1111...."),
        ("a z dog", "a _ <0x7A> _dog <eos> <pad> <pad> <pad>", "1111....", "11111..."),
        ("a red dog runs a red dog", "a _red _dog _runs _a _red _dog <eos>", "1111111.", "11111111"),
        (LONGER, "a _red _dog _runs _a _red _dog <eos>", "1111111.", "11111111"),
    ],
    # No end is written.
    "GPT-2": [
        ("a red dog", "a _red _dog <end> <end> <end> <end> <end>", "111.....", "111....."),
        ("", "<end> <end> <end> <end> <end> <end> <end> <end>", "........", "........"),
        ("dog ! dogs!", "dog _! _dog s ! <end> <end> <end>", "11111...", "11111..."),
        ("a z dog", "a _ z _dog <end> <end> <end> <end>", "1111....", "1111...."),
        ("a red dog runs a red dog runs", "a _red _dog _runs _a _red _dog _runs", "11111111", "11111111"),
        (LONGER, "a _red _dog _runs _! _a _red _dog", "11111111", "11111111"),
    ],
    "GPT-2, padded left": [
        ("a red dog", "<end> <end> <end> <end> <end> a _red _dog", ".....111", ".....111"),
        ("", "<end> <end> <end> <end> <end> <end> <end> <end>", "........", "........"),
        ("dog ! dogs!", "<end> <end> <end> dog _! _dog s !", "...11111", "...11111"),
        ("a z dog", "<end> <end> <end> <end> a _ z _dog", "....1111", "....1111"),
        ("a red dog runs a red dog runs", "a _red _dog _runs _a _red _dog _runs", "11111111", "11111111"),
        (LONGER, "a _red _dog _runs _! _a _red _dog", "11111111", "11111111"),
    ],
}
CASES["SigLipTokenizer"] = CASES["SigLIP"]


@pytest.fixture(scope="module")
def hf_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """The tokenizer of a name, made once: for tests that leave it as it is."""
    return lru_cache(lambda name: HUGGING_FACE[name](tmp_path_factory.mktemp("tokenizer")))


def tokens_of(tokenizer: Any, caption: str) -> str:
    (row,) = tokenizer([caption]).tolist()
    return " ".join(tokenizer.tokenizer.convert_ids_to_tokens(row)).replace("▁", "_").replace("Ġ", "_")


@pytest.mark.parametrize(
    ("name", "caption", "row", "words", "everything"),
    [pytest.param(name, *case, id=f"{name}: {case[0]}") for name, cases in CASES.items() for case in cases],
)
def test_hugging_face_tokenizer(
    hf_tokenizer: Callable[[str], Any], name: str, caption: str, row: str, words: str, everything: str
) -> None:
    if name.endswith("padded left") and MAJOR_VERSION > 3:
        pytest.skip("this open_clip pads on the right, whatever the tokenizer")
    tokenizer = hf_tokenizer(name)
    assert tokens_of(tokenizer, caption) == row
    assert mask(tokenizer, caption, "words") == words
    assert mask(tokenizer, caption, "all") == everything


def test_every_hugging_face_tokenizer_has_its_cases() -> None:
    assert CASES.keys() == HUGGING_FACE.keys()


@pytest.mark.parametrize(
    ("name", "caption", "words"),
    [
        ("BERT", "a [MASK] dog", ".1.1...."),
        ("T5", "a <extra_id_0> dog", "1.1....."),
    ],
)
def test_a_special_token_in_a_caption_is_no_word(
    hf_tokenizer: Callable[[str], Any], name: str, caption: str, words: str
) -> None:
    assert mask(hf_tokenizer(name), caption, "words") == words


# The language of NLLB


def test_a_language_set_later_is_no_word_either(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizers.nllb(tmp_path)
    conventions = token_conventions(tokenizer)
    tokenizer.tokenizer.src_lang = "fra_Latn"
    assert tokens_of(tokenizer, "a red dog") == "fra_Latn _a _red _dog </s> <pad> <pad> <pad>"
    assert conventions.mask(tokenizer(["a red dog"]), "words")[0].tolist() == [False, *3 * [True], *4 * [False]]


def test_the_language_stays_as_it_was_set(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizers.nllb(tmp_path)
    tokenizer.set_language("fra_Latn")
    before = tokenizer.tokenizer.encode("a red dog")
    token_conventions(tokenizer)
    assert tokenizer.tokenizer.convert_ids_to_tokens(before[0]) == "fra_Latn"
    assert tokenizer.tokenizer.encode("a red dog") == before


# Tokenizers that no model of open_clip has, by the special tokens that they name and write.


def test_an_end_that_the_tokenizer_knows_but_does_not_write(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizers.word_level(tmp_path, None, eos="[SEP]", pad="[PAD]", unk="[UNK]")
    for tokens in ("words", "all"):
        assert mask(tokenizer, "a red dog", tokens) == "111....."


def test_nothing_but_padding(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizers.word_level(tmp_path, None, pad="[PAD]", unk="[UNK]")
    for tokens in ("words", "all"):
        assert mask(tokenizer, "a red dog", tokens) == "111....."
        assert mask(tokenizer, "", tokens) == "........"


def test_specials_that_the_tokenizer_writes_but_does_not_name(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizers.word_level(tmp_path, "[CLS] $A [SEP]", pad="[PAD]", unk="[UNK]")
    assert mask(tokenizer, "a red dog", "words") == ".111...."
    assert mask(tokenizer, "a red dog", "all") == "11111..."


def test_an_end_that_is_also_the_unknown_word_and_the_padding(tmp_path: Path) -> None:
    # As in OpenAI's CLIP at Hugging Face. An unknown word cannot be told from the end then.
    names = dict.fromkeys(("eos", "pad", "unk"), "[UNK]")
    tokenizer = tiny_tokenizers.word_level(tmp_path, "[CLS] $A [UNK]", bos="[CLS]", **names)
    assert mask(tokenizer, "a red dog", "words") == ".111...."
    assert mask(tokenizer, "a red dog", "all") == "11111..."


def test_an_unknown_word_that_has_another_name_too_is_a_word_where_only_words_have_it(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizers.word_level(tmp_path, None, eos="[UNK]", pad="[PAD]", unk="[UNK]")
    assert mask(tokenizer, "a zebra dog", "words") == "111....."


@pytest.mark.parametrize(("side", "everything"), [("right", "11111..."), ("left", "...11111")])
def test_a_start_and_an_end_that_are_also_the_padding(tmp_path: Path, side: str, everything: str) -> None:
    names = dict.fromkeys(("bos", "eos", "pad"), "[SEP]")
    tokenizer = tiny_tokenizers.word_level(tmp_path, "[SEP] $A [SEP]", **names, unk="[UNK]")
    tokenizer.tokenizer.padding_side = side
    assert mask(tokenizer, "a red dog", "all") == everything
    assert mask(tokenizer, "a red dog", "words").replace(".", "") == "111"


# For any caption


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_the_words_are_the_first_ids_that_the_tokenizer_gives_without_specials(
    hf_tokenizer: Callable[[str], Any], name: str
) -> None:
    tokenizer = hf_tokenizer(name)
    written = {"GPT-2": 0, "T5": 1, "mT5": 1, "SigLIP": 1, "SigLipTokenizer": 1, "SigLIP 2": 1, "CLIPS": 3}
    around = written.get(name.removesuffix(", padded left"), 2)

    @given(st.lists(st.sampled_from([*WORDS, "dogs", "z", "!!"])).map(" ".join), st.integers(around + 1, 12))
    def holds(caption: str, context: int) -> None:
        texts = tokenizer([caption], context_length=context)
        words = token_conventions(tokenizer).mask(texts, "words")
        everything = token_conventions(tokenizer).mask(texts, "all")
        ids = tokenizer.tokenizer.encode(clean(tokenizer, caption), add_special_tokens=False)[: context - around]
        assert texts[words].tolist() == ids
        assert not (words & ~everything).any()
        # The separator of CLIPA is written over.
        assert everything.sum() == len(ids) + around - (name == "CLIPA")

    holds()


@pytest.mark.parametrize("name", ["SimpleTokenizer", *HUGGING_FACE])
def test_mask_words_of_evaluate_and_words_of_show_read_a_tokenizer_alike(
    hf_tokenizer: Callable[[str], Any], name: str
) -> None:
    tokenizer = simple_tokenizer() if name == "SimpleTokenizer" else hf_tokenizer(name)
    caption = "a red dog runs"
    shown = [list(word.positions) for word in read_caption(caption, tokenizer).words]
    assert word_positions(tokenizer, caption) == shown
    counts = token_conventions(tokenizer).mask(tokenizer([caption]), "words")[0].nonzero().flatten().tolist()
    assert [position for word in shown for position in word] == counts


def clean(tokenizer: Any, caption: str) -> str:
    # SigLipTokenizer has no clean_fn: it always canonicalizes.
    return getattr(tokenizer, "clean_fn", open_clip.tokenizer.canonicalize_text)(caption)


@given(st.lists(st.sampled_from([*WORDS, "!$", "zyx", "<extra>"])).map(" ".join), st.integers(3, 12))
def test_the_words_are_the_first_ids_that_simple_tokenizer_gives(caption: str, context: int) -> None:
    tokenizer = simple_tokenizer()
    texts = tokenizer([caption], context_length=context)
    words = token_conventions(tokenizer).mask(texts, "words")
    everything = token_conventions(tokenizer).mask(texts, "all")
    ids = tokenizer.encode(caption)[: context - 2]
    assert texts[words].tolist() == ids
    assert not (words & ~everything).any()
    assert everything.sum() == len(ids) + 2


@given(st.lists(st.lists(st.integers(0, 4), min_size=6, max_size=6), min_size=1, max_size=3))
def test_nothing_after_the_end_counts(rows: list[list[int]]) -> None:
    start, end = 3, 4
    conventions = TokenConventions(special_ids=(start, end), end_id=end)
    words, everything = (conventions.mask(torch.tensor(rows), tokens) for tokens in ("words", "all"))
    for row, is_word, counts in zip(rows, words.tolist(), everything.tolist(), strict=True):
        length = row.index(end) + 1 if end in row else len(row)
        assert counts == [position < length for position in range(len(row))]
        assert is_word == [position < length and row[position] < start for position in range(len(row))]


def test_open_clips_configurations_ask_for_no_other_tokenizer() -> None:
    """A name that is new here needs a look at what it writes around the words."""
    configs = [open_clip.get_model_config(name) for name in open_clip.list_models()]
    texts = [config["text_cfg"] for config in configs if "vision_cfg" in config]
    known = (
        "Alibaba-NLP/gte-modernbert-",
        "roberta-",
        "xlm-roberta-",
        "facebook/xlm-v-",
        "bert-",
        "google/mt5-",
        "facebook/nllb-",
        "timm/ViT-",
    )
    assert all(text.get("hf_tokenizer_name", "bert-").startswith(known) for text in texts)
    options = {option for text in texts for option in (text.get("tokenizer_kwargs") or {})}
    assert options <= {"clean", "strip_sep_token"}


# What is refused


def test_a_tokenizer_without_padding_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizers.word_level(tmp_path, None, unk="[UNK]")
    with pytest.raises(TypeError, match="has no pad_token_id; expected one that pads"):
        token_conventions(tokenizer)


@pytest.mark.parametrize("tokenizer", [None, len, SimpleNamespace(tokenizer=None)], ids=str)
def test_what_is_no_tokenizer_is_refused_by_name(tokenizer: object) -> None:
    message = f"tokenizer is a {type(tokenizer).__name__}; expected what open_clip.get_tokenizer returns"
    with pytest.raises(TypeError, match=message):
        token_conventions(tokenizer)
