"""Which tokens are those of a word, for each kind of open_clip tokenizer."""

import open_clip
import pytest
import tiny_tokenizers
import torch

from sparc_loss.embeddings.words import word_positions


@pytest.fixture(scope="module")
def tokenizer():
    return open_clip.SimpleTokenizer(context_length=16)


def pieces(tokenizer, caption):
    """The text of each word's tokens."""
    ids = tokenizer([caption])[0]
    return [
        [tokenizer.decoder[int(ids[position])] for position in word] for word in word_positions(tokenizer, caption)
    ]


def test_one_token_per_common_word_after_the_start(tokenizer):
    assert word_positions(tokenizer, "a red seven") == [[1], [2], [3]]


def test_a_rare_word_has_several_tokens(tokenizer):
    assert pieces(tokenizer, "red xylotomous dog") == [["red</w>"], ["xy", "lo", "tom", "ous</w>"], ["dog</w>"]]


def test_punctuation_goes_with_the_word_it_stands_at(tokenizer):
    assert pieces(tokenizer, 'a "red" dog!') == [["a</w>"], ['"</w>', "red</w>", '"</w>'], ["dog</w>", "!</w>"]]


def test_words_beyond_the_context_have_no_token(tokenizer):
    positions = word_positions(tokenizer, " ".join(["red"] * 20))
    assert positions[:14] == [[position] for position in range(1, 15)]
    assert positions[14:] == [[]] * 6


def test_an_empty_caption_has_no_words(tokenizer):
    assert word_positions(tokenizer, "  ") == []


def test_white_space_does_not_matter(tokenizer):
    assert word_positions(tokenizer, " a  red\tseven ") == [[1], [2], [3]]


@pytest.mark.parametrize("template", ["[CLS] $A [SEP]", "$A [SEP]", None])
def test_hugging_face_tokenizers(tmp_path, template):
    special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]"}
    tokenizer = tiny_tokenizers.word_level(tmp_path, template, **special)
    tokens = tokenizer.tokenizer.convert_ids_to_tokens(tokenizer(["red dog! runs"])[0])
    found = [[tokens[position] for position in word] for word in word_positions(tokenizer, "red dog! runs")]
    assert found == [["red"], ["dog", "!"], ["runs"]]


def test_a_word_that_the_tokenizer_drops_has_no_token():
    tokenizer = open_clip.SimpleTokenizer(context_length=16, clean="canonicalize")
    assert word_positions(tokenizer, "red - dog") == [[1], [], [2]]
    assert word_positions(tokenizer, "- dog") == [[], [1]]


class WithoutSpans:
    """A tokenizer that gives no spans of its tokens: one for each letter."""

    sot_token_id, eot_token_id = 1, 2

    def __call__(self, texts):
        rows = [[1, *(ord(letter) for letter in text if letter != " "), 2] for text in texts]
        return torch.tensor([row + [0] * (12 - len(row)) for row in rows])


def test_a_tokenizer_without_spans_is_read_word_by_word():
    assert word_positions(WithoutSpans(), "a dog  ran") == [[1], [2, 3, 4], [5, 6, 7]]


def test_words_that_depend_on_what_follows_are_refused():
    class LastFirst(WithoutSpans):
        def __call__(self, texts):
            return super().__call__([" ".join(reversed(text.split())) for text in texts])

    with pytest.raises(ValueError, match="caption 'a dog': its beginning 'a' is tokenized differently on its own"):
        word_positions(LastFirst(), "a dog")


def test_words_that_are_cleaned_differently_on_their_own_are_refused():
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    tokenizer.clean_fn = lambda text: text.replace(" ", "")
    with pytest.raises(ValueError, match="caption 'red dog' is cleaned to 'reddog', its words alone to"):
        word_positions(tokenizer, "red dog")


def test_another_tokenizer_is_refused():
    with pytest.raises(TypeError, match="tokenizer is a function; expected what open_clip"):
        word_positions(lambda texts: torch.ones(len(texts), 4, dtype=torch.long), "a dog")
