"""Tokenizers of every kind that open_clip's models have, real but small, made here.

Each is written to a folder the way the Hugging Face hub keeps it (tokenizer.json and tokenizer_config.json), and
loaded from there by open_clip's own HFTokenizer: so the class is the one that transformers has for it.
"""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import transformers
from open_clip.tokenizer import HFTokenizer, SigLipTokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

CONTEXT = 8
# Every tokenizer knows these words whole, and "dogs" as two pieces.
WORDS = ("a", "red", "dog", "runs", "!")


def bert(folder: Path, **options: Any) -> HFTokenizer:
    """[CLS] words [SEP] [PAD] ..."""
    special = ("[PAD]", "[BOS]", "[EOS]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    backend = Tokenizer(models.WordPiece(_numbered(*special, *WORDS, "##s"), unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return _load(folder, "BertTokenizer", backend, names, "[CLS] $A [SEP]", **options)


def roberta(folder: Path, **options: Any) -> HFTokenizer:
    """<s> words </s> <pad> ..., of bytes that are merged; a space belongs to the word after it."""
    special = ("<s>", "<pad>", "</s>", "<unk>")
    names = {"bos": "<s>", "cls": "<s>", "pad": "<pad>", "eos": "</s>", "sep": "</s>", "unk": "<unk>"}
    backend = _byte_level(*special)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return _load(folder, "RobertaTokenizer", backend, {**names, "mask": "<mask>"}, None, **options)


def gpt2(folder: Path, **options: Any) -> HFTokenizer:
    """words <end> ...: start, end, unknown and, as set for want of another, padding; it writes no end."""
    names = dict.fromkeys(("bos", "eos", "unk", "pad"), "<end>")
    backend = _byte_level()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return _load(folder, "GPT2Tokenizer", backend, names, None, **options)


def xlm_roberta(folder: Path, **options: Any) -> HFTokenizer:
    """<s> words </s> <pad> ..., with the ids 0, 2, 1 (XLM-R and XLM-V)."""
    names = {"bos": "<s>", "cls": "<s>", "pad": "<pad>", "eos": "</s>", "sep": "</s>", "unk": "<unk>"}
    backend = _unigram("<s>", "<pad>", "</s>", "<unk>")
    return _load(folder, "XLMRobertaTokenizer", backend, {**names, "mask": "<mask>"}, "<s> $A </s>", **options)


def t5(folder: Path, **options: Any) -> HFTokenizer:
    """words </s> <pad> ..., with sentinels (T5 and mT5)."""
    sentinels = ["<extra_id_1>", "<extra_id_0>"]
    backend = _unigram("<pad>", "</s>", "<unk>")
    config = {"extra_ids": 2, "additional_special_tokens": sentinels}
    return _load(
        folder, "T5Tokenizer", backend, {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}, "$A </s>", config, **options
    )


def siglip(folder: Path, **options: Any) -> HFTokenizer:
    """words </s> </s> ...: the first is the end, the others are padding."""
    backend = _unigram("<pad>", "</s>", "<unk>")
    config = {"extra_ids": 0, "additional_special_tokens": []}
    names = {"pad": "</s>", "eos": "</s>", "unk": "<unk>"}
    return _load(folder, "T5Tokenizer", backend, names, "$A </s>", config, **options)


def gemma(folder: Path, **options: Any) -> HFTokenizer:
    """words <eos> <pad> ...; <bos> is known but not written (SigLIP 2). What is no known word is bytes."""
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    pieces, merges = _merged("▁")
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = _numbered(*special, *byte_pieces, *pieces)
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    names = {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>", "unk": "<unk>"}
    config = {"add_bos_token": False, "add_eos_token": True, "padding_side": "right"}
    return _load(folder, "GemmaTokenizer", backend, names, "$A <eos>", config, **options)


def siglip_of_old(folder: Path, **options: Any) -> SigLipTokenizer:
    """The same from open_clip's SigLipTokenizer, whose constructor fails with transformers 5; done by hand here."""
    tokenizer = SigLipTokenizer.__new__(SigLipTokenizer)
    tokenizer.tokenizer = t5(folder, **options).tokenizer
    tokenizer.tokenizer.pad_token_id = tokenizer.tokenizer.eos_token_id = 1
    tokenizer.context_length = CONTEXT
    return tokenizer


def nllb(folder: Path, legacy: bool = False, **options: Any) -> HFTokenizer:
    """A language code, words </s> <pad> ...; in the legacy form words </s> and then the language code."""
    languages = ["eng_Latn", "fra_Latn"]
    pieces, merges = _merged("▁")
    special = ("<s>", "<pad>", "</s>", "<unk>")
    backend = Tokenizer(models.BPE(_numbered(*special, *pieces), merges, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.add_special_tokens([*languages, "<mask>"])
    names = {
        "bos": "<s>",
        "cls": "<s>",
        "pad": "<pad>",
        "eos": "</s>",
        "sep": "</s>",
        "unk": "<unk>",
        "mask": "<mask>",
    }
    config = {"additional_special_tokens": languages, "legacy_behaviour": legacy}
    template = "$A </s> eng_Latn" if legacy else "eng_Latn $A </s>"
    return _load(folder, "NllbTokenizer", backend, names, template, config, **options)


def word_level(folder: Path, template: str | None, config: dict[str, Any] | None = None, **names: str) -> HFTokenizer:
    """Whole words, and the special tokens put around them by `template` ("$A" is the caption)."""
    backend = Tokenizer(models.WordLevel(_numbered("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS), unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return _load(folder, "PreTrainedTokenizerFast", backend, names, template, config)


def _load(
    folder: Path,
    tokenizer_class: str,
    backend: Tokenizer,
    names: dict[str, str],
    template: str | None,
    config: dict[str, Any] | None = None,
    **options: Any,
) -> HFTokenizer:
    if open_clip.__version__ < "3.3" and transformers.__version__ >= "5":
        pytest.skip("open_clip's HFTokenizer works with transformers 5 from 3.3.0 on")
    backend.add_special_tokens(sorted(set(names.values())))
    if template:
        ids = [(token, backend.token_to_id(token)) for token in template.split() if token != "$A"]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {f"{name}_token": token for name, token in names.items()} | (config or {})
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": tokenizer_class, **config}), encoding="utf-8"
    )
    return HFTokenizer(str(folder), **{"context_length": CONTEXT, **options})


def _byte_level(*special: str) -> Tokenizer:
    pieces, merges = _merged("Ġ")
    letters = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(pieces))
    backend = Tokenizer(models.BPE(_numbered(*special, *letters, *pieces), merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _unigram(*special: str) -> Tokenizer:
    pieces = [(f"▁{word}", -1.0) for word in WORDS] + [("▁", -5.0), ("!", -3.0), ("s", -3.0)]
    special = [(token, 0.0) for token in special]
    backend = Tokenizer(models.Unigram(special + pieces, unk_id=len(special) - 1))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    backend.decoder = decoders.Metaspace()
    return backend


def _merged(space: str) -> tuple[list[str], list[tuple[str, str]]]:
    """The pieces and the merges that make the words out of their letters, with `space` before them and without."""
    words = [space + word for word in WORDS] + list(WORDS)
    merges = list(dict.fromkeys((word[:end], word[end]) for word in words for end in range(1, len(word))))
    letters = sorted({letter for word in words for letter in word})
    return [*letters, *("".join(pair) for pair in merges)], merges


def _numbered(*tokens: str) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}
