"""Small real tokenizers of every convention that open_clip's models use, read back by open_clip's own classes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import transformers
from open_clip.tokenizer import HFTokenizer, SigLipTokenizer
from tiny_models import CONTEXT
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertTokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    NllbTokenizer,
    PreTrainedTokenizerBase,
    RobertaTokenizer,
    T5Tokenizer,
    XLMRobertaTokenizer,
)

WORDS = ("a", "red", "dog", "!")
UNKNOWN = "zebra"


def _word_pieces(*special: str, **options: Any) -> BertTokenizer:
    pieces = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *special, *WORDS)
    return BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, **options)


def _unigrams(*special: str) -> list[tuple[str, float]]:
    pieces = [("▁" + word, -1.0) for word in WORDS] + [("!", -1.0), ("▁", -2.0)]
    return [(piece, 0.0) for piece in special] + pieces


def _merges(*special: str, space: str) -> dict[str, Any]:
    """A byte-pair vocabulary in which every word, with or without a space before it, is one piece."""
    merges = []
    for word in (*(space + word for word in WORDS), *WORDS):
        merges += [(word[:end], word[end]) for end in range(1, len(word))]
    letters = sorted({letter for word in WORDS for letter in word} | {space})
    pieces = dict.fromkeys([*special, *letters, *(left + right for left, right in merges)])
    return {"vocab": {piece: index for index, piece in enumerate(pieces)}, "merges": list(dict.fromkeys(merges))}


def _gpt2_that_writes_its_end() -> GPT2Tokenizer:
    tokenizer = GPT2Tokenizer(**_merges("<|endoftext|>", "<pad>", space="Ġ"), pad_token="<pad>")
    end = [("<|endoftext|>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|endoftext|>", special_tokens=end)
    return tokenizer


SENTENCEPIECE = ("<s>", "<pad>", "</s>", "<unk>")
GEMMA = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "BERT": _word_pieces,
    "BERT, padded left": lambda: _word_pieces(padding_side="left"),
    "BERT with bos and eos": lambda: _word_pieces("<bos>", "<eos>", bos_token="<bos>", eos_token="<eos>"),
    "RoBERTa": lambda: RobertaTokenizer(**_merges(*SENTENCEPIECE, "<mask>", space="Ġ")),
    "XLM-RoBERTa": lambda: XLMRobertaTokenizer(vocab=[*_unigrams(*SENTENCEPIECE), ("<mask>", 0.0)]),
    "T5": lambda: T5Tokenizer(vocab=_unigrams("<pad>", "</s>", "<unk>"), extra_ids=2),
    "SigLIP": lambda: T5Tokenizer(vocab=_unigrams("<unk>", "</s>"), extra_ids=0, pad_token="</s>"),
    "SigLIP, padded left": lambda: T5Tokenizer(
        vocab=_unigrams("<unk>", "</s>"), extra_ids=0, pad_token="</s>", padding_side="left"
    ),
    "Gemma": lambda: GemmaTokenizer(
        **_merges(*GEMMA, space="▁"), padding_side="right", add_bos_token=False, add_eos_token=True
    ),
    "NLLB": lambda: NllbTokenizer(**_merges(*SENTENCEPIECE, space="▁"), src_lang="eng_Latn"),
    "NLLB, legacy": lambda: NllbTokenizer(
        **_merges(*SENTENCEPIECE, space="▁"), src_lang="eng_Latn", legacy_behaviour=True
    ),
    "GPT-2, end written": _gpt2_that_writes_its_end,
    "GPT-2": lambda: GPT2Tokenizer(**_merges("<|endoftext|>", space="Ġ"), pad_token="<|endoftext|>"),
    "GPT-2, padded left": lambda: GPT2Tokenizer(
        **_merges("<|endoftext|>", space="Ġ"), pad_token="<|endoftext|>", padding_side="left"
    ),
}


def hf_tokenizer(folder: Path, name: str, **options: Any) -> HFTokenizer:
    """open_clip's HFTokenizer over one of TOKENIZERS, saved in `folder`; the options are HFTokenizer's."""
    if open_clip.__version__ < "3.3" and transformers.__version__ >= "5":
        pytest.skip("open_clip's HFTokenizer works with transformers 5 from 3.3.0 on")
    TOKENIZERS[name]().save_pretrained(folder)
    return HFTokenizer(str(folder), context_length=CONTEXT, **options)


def siglip_tokenizer(name: str) -> SigLipTokenizer:
    """open_clip's SigLipTokenizer, which reads a sentencepiece file, over one of TOKENIZERS in that file's place."""
    tokenizer = object.__new__(SigLipTokenizer)
    tokenizer.tokenizer = TOKENIZERS[name]()
    tokenizer.context_length = CONTEXT
    return tokenizer
