"""Which positions of a tokenized caption count: by hand, for every convention that tokenizers have."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer
from tiny_tokenizers import TOKENIZERS, UNKNOWN, WORDS, hf_tokenizer, siglip_tokenizer

from sparc_loss.embeddings.token_mask import token_conventions


def mask(tokenizer: object, caption: str, tokens: str) -> str:
    """The mask of one caption: 1 for what counts, . for what does not."""
    (row,) = token_conventions(tokenizer).mask(tokenizer([caption]), tokens)
    return "".join("1" if counts else "." for counts in row)


# SimpleTokenizer: START words END, padded with 0, which is also a "!" with another sign right after it.


@pytest.mark.parametrize(
    ("caption", "words", "everything"),
    [
        ("a red dog", ".111....", "11111..."),
        ("", "........", "11......"),
        ("!", ".1......", "111....."),
        ("dog !$ dog", ".1111...", "111111.."),
        # Cut to the context, END in the last place.
        ("one two three four five six seven eight nine", ".111111.", "11111111"),
        # Exactly as long as the context.
        ("one two three four five six", ".111111.", "11111111"),
    ],
)
@pytest.mark.parametrize("clean", ["lower", "whitespace"])
def test_simple_tokenizer(caption: str, words: str, everything: str, clean: str) -> None:
    tokenizer = SimpleTokenizer(context_length=8, clean=clean)
    assert mask(tokenizer, caption, "words") == words
    assert mask(tokenizer, caption, "all") == everything


def test_simple_tokenizer_without_punctuation() -> None:
    tokenizer = SimpleTokenizer(context_length=8, clean="canonicalize")
    assert mask(tokenizer, "dog !$ dog", "words") == ".11....."
    assert mask(tokenizer, "!", "words") == "........"


def test_an_exclamation_mark_can_have_the_id_of_padding() -> None:
    assert SimpleTokenizer(context_length=8)(["dog !$ dog"])[0].tolist()[2] == 0


@pytest.mark.parametrize("reduction", ["simple", "random", "shuffle", "syntax"])
@pytest.mark.parametrize(
    ("caption", "words"), [("dog !$ dog", ".1111..."), ("", "........"), ("a b c d e f g h i", ".111111.")]
)
def test_simple_tokenizer_that_draws_which_words_to_keep(
    reduction: str, caption: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # nltk's tagger needs data from the net: here every word is a noun.
    nltk = ModuleType("nltk")
    nltk.download = lambda _: None
    nltk.tokenize = SimpleNamespace(word_tokenize=str.split)
    nltk.pos_tag = lambda words: [(word, "NN") for word in words]
    monkeypatch.setitem(sys.modules, "nltk", nltk)
    tokenizer = SimpleTokenizer(context_length=8, reduction_mask=reduction)
    assert mask(tokenizer, caption, "words") == words


def test_additional_special_tokens_are_no_words() -> None:
    tokenizer = SimpleTokenizer(context_length=8, additional_special_tokens=["<region>"])
    assert mask(tokenizer, "a <region> dog", "words") == ".1.1...."
    assert mask(tokenizer, "a <region> dog", "all") == "11111..."


def test_every_caption_of_a_batch_has_its_own_length() -> None:
    tokenizer = SimpleTokenizer(context_length=6)
    counts = token_conventions(tokenizer).mask(tokenizer(["dog", "", "a red dog !"]), "words")
    assert counts.dtype == torch.bool
    assert counts.sum(dim=1).tolist() == [1, 0, 4]


# Hugging Face tokenizers. Of each: an ordinary caption, an empty one, one too long, one with a "!".

CAPTIONS = ("a red dog", "", "a a a a a a a a a", "a dog!")
START_AND_END = {
    "words": (".111....", "........", ".111111.", ".111...."),
    "all": ("11111...", "11......", "11111111", "11111..."),
}
END = {
    "words": ("111.....", "........", "1111111.", "111....."),
    "all": ("1111....", "1.......", "11111111", "1111...."),
}
NEITHER = {
    "words": ("111.....", "........", "11111111", "111....."),
    "all": ("111.....", "........", "11111111", "111....."),
}
WITHOUT_PUNCTUATION = {
    "words": ("111.....", "........", "1111111.", "11......"),
    "all": ("1111....", "1.......", "11111111", "111....."),
}
CONVENTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    # [CLS] a red dog [SEP] [PAD] ...
    "BERT": START_AND_END,
    "BERT, padded left": {
        "words": ("....111.", "........", ".111111.", "....111."),
        "all": ("...11111", "......11", "11111111", "...11111"),
    },
    "RoBERTa": START_AND_END,
    "XLM-RoBERTa": START_AND_END,
    # a red dog </s> <pad> ...
    "T5": END,
    "Gemma": END,
    # a red dog </s> </s> ...: the first is the end, the others padding.
    "SigLIP": END,
    "SigLIP, padded left": {
        "words": ("....111.", "........", "1111111.", "....111."),
        "all": ("....1111", ".......1", "11111111", "....1111"),
    },
    # eng_Latn a red dog </s> <pad> ...
    "NLLB": START_AND_END,
    # a red dog </s> eng_Latn <pad> ...
    "NLLB, legacy": {
        "words": ("111.....", "........", "111111..", "111....."),
        "all": ("11111...", "11......", "11111111", "11111..."),
    },
    # a red dog <|endoftext|> <pad> ...: the end is the unknown word as well.
    "GPT-2, end written": END,
    # a red dog <|endoftext|> ...: the end is known, but not written; all of them are padding.
    "GPT-2": NEITHER,
    "GPT-2, padded left": {
        "words": (".....111", "........", "11111111", ".....111"),
        "all": (".....111", "........", "11111111", ".....111"),
    },
}


@pytest.mark.parametrize("tokens", ["words", "all"])
@pytest.mark.parametrize("name", CONVENTIONS)
def test_hf_tokenizer(name: str, tokens: str, tmp_path: Path) -> None:
    tokenizer = hf_tokenizer(tmp_path, name)
    assert tuple(mask(tokenizer, caption, tokens) for caption in CAPTIONS) == CONVENTIONS[name][tokens]


MODES: dict[str, tuple[str, dict[str, Any], dict[str, tuple[str, ...]]]] = {
    # CLIPA: [CLS] a red dog, the separator made padding.
    "strip_sep_token": (
        "BERT",
        {"strip_sep_token": True},
        {
            "words": (".111....", "........", ".111111.", ".111...."),
            "all": ("1111....", "1.......", "1111111.", "1111...."),
        },
    ),
    # <bos> a red dog <eos> [PAD] [PAD] [CLS]
    "clips": (
        "BERT with bos and eos",
        {"tokenizer_mode": "clips"},
        {
            "words": (".111....", "........", ".11111..", ".111...."),
            "all": ("11111..1", "11.....1", "11111111", "11111..1"),
        },
    ),
    "canonicalize": ("SigLIP", {"clean": "canonicalize"}, WITHOUT_PUNCTUATION),
}


@pytest.mark.parametrize("tokens", ["words", "all"])
@pytest.mark.parametrize("mode", MODES)
def test_hf_tokenizer_in_the_modes_of_open_clip(mode: str, tokens: str, tmp_path: Path) -> None:
    name, options, expected = MODES[mode]
    tokenizer = hf_tokenizer(tmp_path, name, **options)
    assert tuple(mask(tokenizer, caption, tokens) for caption in CAPTIONS) == expected[tokens]


@pytest.mark.parametrize("tokens", ["words", "all"])
def test_siglip_tokenizer(tokens: str) -> None:
    tokenizer = siglip_tokenizer("SigLIP")
    assert tuple(mask(tokenizer, caption, tokens) for caption in CAPTIONS) == WITHOUT_PUNCTUATION[tokens]


@pytest.mark.parametrize(("name", "words"), [("BERT", ".11....."), ("T5", "111....."), ("XLM-RoBERTa", ".111....")])
def test_an_unknown_word_is_a_word(name: str, words: str, tmp_path: Path) -> None:
    # T5 and XLM-RoBERTa write the space before it as a piece of its own.
    tokenizer = hf_tokenizer(tmp_path, name)
    assert tokenizer.tokenizer.unk_token_id in tokenizer([f"a {UNKNOWN}"])
    assert mask(tokenizer, f"a {UNKNOWN}", "words") == words


def test_the_language_can_be_changed_after_the_conventions_were_read(tmp_path: Path) -> None:
    tokenizer = hf_tokenizer(tmp_path, "NLLB")
    conventions = token_conventions(tokenizer)
    tokenizer.tokenizer.src_lang = "fra_Latn"
    texts = tokenizer(["a red dog"])
    assert tokenizer.tokenizer.convert_ids_to_tokens(texts[0, :1].tolist()) == ["fra_Latn"]
    assert conventions.mask(texts, "words")[0].int().tolist() == [0, 1, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("name", CONVENTIONS)
@given(words=st.lists(st.sampled_from(WORDS), max_size=12))
def test_what_counts_is_what_the_tokenizer_writes_between_its_specials(
    name: str, words: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tokenizer = hf_tokenizer(tmp_path_factory.mktemp("tokenizer"), name)
    caption = " ".join(words)
    texts, conventions = tokenizer([caption]), token_conventions(tokenizer)
    counts, everything = conventions.mask(texts, "words"), conventions.mask(texts, "all")
    specials = len(tokenizer.tokenizer("")["input_ids"])
    written = tokenizer.tokenizer(caption, add_special_tokens=False)["input_ids"][: texts.shape[1] - specials]
    assert texts[counts].tolist() == written
    assert everything.sum() == len(written) + specials
    assert not (counts & ~everything).any()


def test_open_clips_configurations_ask_for_no_other_tokenizer() -> None:
    """A name that is new here needs a look at what it writes around the words."""
    texts = [open_clip.get_model_config(name)["text_cfg"] for name in open_clip.list_models()]
    known = ("roberta-", "xlm-roberta-", "facebook/xlm-v-", "bert-", "google/mt5-", "facebook/nllb-", "timm/ViT-")
    assert all(text.get("hf_tokenizer_name", "bert-").startswith(known) for text in texts)
    options = {option for text in texts for option in (text.get("tokenizer_kwargs") or {})}
    assert options <= {"clean", "strip_sep_token"}


# What is refused


def test_a_tokenizer_without_padding_is_refused() -> None:
    tokenizer = SimpleNamespace(tokenizer=TOKENIZERS["GPT-2"]())
    tokenizer.tokenizer.pad_token = None
    with pytest.raises(TypeError, match="tokenizer GPT2Tokenizer has no pad_token_id; expected one that pads"):
        token_conventions(tokenizer)


@pytest.mark.parametrize("tokenizer", [None, len, SimpleNamespace(tokenizer=None)], ids=str)
def test_what_is_no_tokenizer_is_refused_by_name(tokenizer: object) -> None:
    message = f"tokenizer is a {type(tokenizer).__name__}; expected what open_clip.get_tokenizer returns"
    with pytest.raises(TypeError, match=message):
        token_conventions(tokenizer)
