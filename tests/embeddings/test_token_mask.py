"""Which positions of a tokenized caption count: by hand, for every convention that tokenizers have."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from tiny_models import hf_tokenizer, ids_of

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
def test_simple_tokenizer(caption: str, words: str, everything: str) -> None:
    tokenizer = SimpleTokenizer(context_length=8)
    assert mask(tokenizer, caption, "words") == words
    assert mask(tokenizer, caption, "all") == everything


def test_an_exclamation_mark_can_have_the_id_of_padding() -> None:
    assert SimpleTokenizer(context_length=8)(["dog !$ dog"])[0].tolist()[2] == 0


def test_every_caption_of_a_batch_has_its_own_length() -> None:
    tokenizer = SimpleTokenizer(context_length=6)
    counts = token_conventions(tokenizer).mask(tokenizer(["dog", "", "a red dog !"]), "words")
    assert counts.dtype == torch.bool
    assert counts.sum(dim=1).tolist() == [1, 0, 4]


# Hugging Face tokenizers, by the special tokens they have.


def test_start_and_separator_with_a_padding_of_their_own(tmp_path: Path) -> None:
    # BERT: [CLS] words [SEP] [PAD] ...
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    tokenizer = hf_tokenizer(tmp_path, "[CLS] $A [SEP]", **names)
    assert mask(tokenizer, "a red dog", "words") == ".111...."
    assert mask(tokenizer, "a red dog", "all") == "11111..."
    assert mask(tokenizer, "", "words") == "........"
    assert mask(tokenizer, "", "all") == "11......"
    assert mask(tokenizer, "a a a a a a a a a", "words") == ".111111."


def test_an_unknown_word_is_a_word(tmp_path: Path) -> None:
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    tokenizer = hf_tokenizer(tmp_path, "[CLS] $A [SEP]", **names)
    assert tokenizer(["a zebra"])[0].tolist()[2] == ids_of(tokenizer)["[UNK]"]
    assert mask(tokenizer, "a zebra", "words") == ".11....."


def test_an_end_that_is_also_the_padding(tmp_path: Path) -> None:
    # SigLIP: words </s> </s> ...; the first of them is the end, the others padding.
    tokenizer = hf_tokenizer(tmp_path, "$A [SEP]", eos_token="[SEP]", pad_token="[SEP]", unk_token="[UNK]")
    assert mask(tokenizer, "a red dog", "words") == "111....."
    assert mask(tokenizer, "a red dog", "all") == "1111...."
    assert mask(tokenizer, "", "words") == "........"
    assert mask(tokenizer, "", "all") == "1......."
    assert mask(tokenizer, "a a a a a a a a a", "words") == "1111111."


def test_an_end_apart_from_the_padding(tmp_path: Path) -> None:
    # SigLIP 2: words <eos> <pad> ...
    tokenizer = hf_tokenizer(tmp_path, "$A [SEP]", eos_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]")
    assert mask(tokenizer, "a red dog", "words") == "111....."
    assert mask(tokenizer, "a red dog", "all") == "1111...."


def test_a_start_and_an_end(tmp_path: Path) -> None:
    # XLM-RoBERTa: <s> words </s> <pad> ...
    names = {"bos_token": "[CLS]", "eos_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    tokenizer = hf_tokenizer(tmp_path, "[CLS] $A [SEP]", **names)
    assert mask(tokenizer, "a red dog", "words") == ".111...."
    assert mask(tokenizer, "a red dog", "all") == "11111..."


def test_an_end_that_the_tokenizer_knows_but_does_not_write(tmp_path: Path) -> None:
    tokenizer = hf_tokenizer(tmp_path, None, eos_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]")
    for tokens in ("words", "all"):
        assert mask(tokenizer, "a red dog", tokens) == "111....."


def test_nothing_but_padding(tmp_path: Path) -> None:
    tokenizer = hf_tokenizer(tmp_path, None, pad_token="[PAD]", unk_token="[UNK]")
    for tokens in ("words", "all"):
        assert mask(tokenizer, "a red dog", tokens) == "111....."
        assert mask(tokenizer, "", tokens) == "........"


# What is refused


def test_a_tokenizer_without_padding_is_refused(tmp_path: Path) -> None:
    tokenizer = hf_tokenizer(tmp_path, None, unk_token="[UNK]")
    with pytest.raises(TypeError, match="has no pad_token_id; expected one that pads"):
        token_conventions(tokenizer)


@pytest.mark.parametrize("tokenizer", [None, len, SimpleNamespace(tokenizer=None)], ids=str)
def test_what_is_no_tokenizer_is_refused_by_name(tokenizer: object) -> None:
    message = f"tokenizer is a {type(tokenizer).__name__}; expected what open_clip.get_tokenizer returns"
    with pytest.raises(TypeError, match=message):
        token_conventions(tokenizer)
