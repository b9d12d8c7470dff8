"""Words out of a tokenizer's pieces."""

import pytest
from major_version import MAJOR_VERSION
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from tiny_tokenizers import CONTEXT, word_level
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sparc_loss.embeddings.token_mask import token_conventions
from sparc_loss.embeddings.words import Caption, read_caption

CORPUS = ["a red dog runs, isn't it?", "狗在跑 and the dogs run", "naïve café dogs", "कुत्ता दौड़ता है", "🐶🐱!!"]


def texts_of(caption: Caption) -> list[str]:
    return [caption[word] for word in caption.words]


@pytest.fixture(scope="module")
def simple():
    return SimpleTokenizer()


@pytest.fixture(scope="module", params=["byte-level BPE", "unigram", "unigram over white space", "WordPiece"])
def hugging_face(request, tmp_path_factory):
    """Tokenizers of the kinds that open_clip's Hugging Face towers have, trained here on a few words."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    if request.param == "byte-level BPE":  # RoBERTa
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    elif request.param.startswith("unigram"):  # XLM-RoBERTa, NLLB and mT5; SigLIP 2, whose pieces may hold spaces
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        splits = "over" not in request.param
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=splits)
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>")
    else:  # BERT
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=110, special_tokens=special)
    trainer.show_progress = False
    tokenizer.train_from_iterator(CORPUS * 5, trainer)
    ids = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    word_level(folder / "skips", None, pad="[PAD]")  # where open_clip and transformers do not fit
    return HFTokenizer(str(folder), context_length=40)


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A red dog", ["a", "red", "dog"]),
        ("an antidisestablishmentarianism", ["an", "antidisestablishmentarianism"]),
        ("isn't it, Bob's?!", ["isn't", "it", ",", "bob's", "?!"]),
        ("12 dogs", ["12", "dogs"]),
        ("привет, мир", ["привет", ",", "мир"]),
        ("कुत्ता दौड़ता है", ["कुत्ता", "दौड़ता", "है"]),
        ("狗在跑", ["狗", "在", "跑"]),
        ("🐶❤️ dogs", ["🐶", "❤️", "dogs"]),
        ("$x^2$ &lt;b&gt;", ["$", "x", "^", "2", "$", "<", "b", ">"]),
    ],
)
def test_simple_tokenizer_words(simple, caption, words):
    assert texts_of(read_caption(caption, simple)) == words


@pytest.mark.parametrize("caption", ["a naïve dog isn't 狗!", "antidisestablishmentarianism привет 🐶", "a " * 100])
def test_every_position_that_counts_is_one_words_and_stands_in_order(simple, caption):
    positions = [place for word in read_caption(caption, simple).words for place in word.positions]
    mask = token_conventions(simple).mask(simple([caption]), "words")[0]
    assert positions == mask.nonzero().flatten().tolist()


@pytest.mark.parametrize("caption", ["a red dog runs, isn't it?", "the café dogs", "कुत्ता दौड़ता है"])
def test_hugging_face_tokenizers_give_the_same_words(hugging_face, simple, caption):
    assert texts_of(read_caption(caption, hugging_face)) == texts_of(read_caption(caption, simple))


def test_a_piece_over_several_characters_without_spaces_makes_them_one_word(hugging_face):
    caption = read_caption("狗在跑 run", hugging_face)
    *chinese, last = texts_of(caption)
    assert "".join(chinese) == "狗在跑"
    assert last == "run"


def test_a_characters_pieces_come_together_again(simple):
    (word,) = read_caption("鯨", simple).words
    assert len(word.positions) > 1


def test_pieces_are_those_of_the_tokenizers_ids(tmp_path):
    tokenizer = word_level(tmp_path, "[CLS] $A [SEP]", pad="[PAD]", cls="[CLS]", sep="[SEP]")
    caption = read_caption("a  red dog !", tokenizer)
    assert [(caption[word], word.positions) for word in caption.words] == [
        ("a", (1,)),
        ("red", (2,)),
        ("dog", (3,)),
        ("!", (4,)),
    ]


def test_a_left_padding_tokenizer_counts_from_the_end(tmp_path):
    tokenizer = word_level(tmp_path, None, config={"padding_side": "left"}, pad="[PAD]")
    caption = read_caption("a dog", tokenizer)
    # open_clip 4 pads on the right whatever the tokenizer's own side is.
    first = CONTEXT - 2 if MAJOR_VERSION == 3 else 0
    assert [word.positions for word in caption.words] == [(first,), (first + 1,)]


@pytest.mark.parametrize(("side", "read"), [("right", slice(0, CONTEXT)), ("left", slice(2, None))])
def test_words_beyond_the_context_are_known_and_not_read(tmp_path, side, read):
    tokenizer = word_level(tmp_path, None, config={"truncation_side": side}, pad="[PAD]")
    caption = read_caption("a red dog runs ! " * 2, tokenizer)
    assert len(caption.words) == CONTEXT + 2
    assert caption.read == caption.words[read]


def test_a_word_cut_in_its_middle_is_read(simple):
    simple = SimpleTokenizer(context_length=4)
    caption = read_caption("a antidisestablishmentarianism dog", simple)
    assert [word.positions for word in caption.words] == [(1,), (2,), ()]


@pytest.mark.parametrize("caption", ["", "  \n"])
def test_a_caption_without_words_is_refused(simple, caption):
    with pytest.raises(ValueError, match=r"caption is '.*'; expected at least one word"):
        read_caption(caption, simple)


def test_a_tokenizer_that_drops_pieces_is_refused():
    tokenizer = SimpleTokenizer(context_length=6, reduction_mask="shuffle")
    with pytest.raises(ValueError, match=r"SimpleTokenizer that drops or reorders pieces of .* reduction_mask"):
        read_caption("one two three four five six seven eight nine ten", tokenizer)


def test_a_slow_tokenizer_has_the_words_between_white_space(tmp_path, monkeypatch):
    tokenizer = word_level(tmp_path, None, pad="[PAD]")
    monkeypatch.setattr(type(tokenizer.tokenizer), "is_fast", False)
    caption = read_caption("a red dog!", tokenizer)
    assert [(caption[word], len(word.positions)) for word in caption.words] == [("a", 1), ("red", 1), ("dog!", 2)]


def test_what_is_no_tokenizer_is_refused():
    with pytest.raises(TypeError, match=r"tokenizer is a str; expected what open_clip.get_tokenizer returns"):
        read_caption("a dog", "ViT-B-32")
