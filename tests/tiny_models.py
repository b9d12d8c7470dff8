"""Tiny untrained open_clip models of every kind that can be surfaced, and tokenizers made here."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from open_clip import CLIP, CustomTextCLIP
from open_clip.tokenizer import HFTokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedTokenizerFast

EMBED_DIM, CONTEXT, VOCABULARY = 16, 8, 64
START, END = VOCABULARY - 2, VOCABULARY - 1
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = ("a", "red", "dog", "runs", "!")

VIT = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": (16, 24)}
VISION: dict[str, dict[str, Any]] = {
    "ViT tok": VIT,
    "ViT avg": {**VIT, "pool_type": "avg"},
    "ViT tok, final_ln_after_pool": {**VIT, "final_ln_after_pool": True},
    "ViT avg, final_ln_after_pool": {**VIT, "pool_type": "avg", "final_ln_after_pool": True},
    "timm ViT token": {"timm_model_name": "test_vit", "timm_pool": "token", "image_size": 160},
    "timm ViT avg": {"timm_model_name": "test_vit", "timm_pool": "avg", "image_size": 160},
    "timm ViT avg, fc_norm": {"timm_model_name": "test_vit2", "timm_pool": "avg", "image_size": 160},
    "timm ViT map": {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none", "image_size": 160},
    "timm ViT map, linear": {"timm_model_name": "test_vit3", "timm_pool": "map", "image_size": 160},
    "timm ViT avg, mlp": {"timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "mlp", "image_size": 160},
}
TRANSFORMER = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 32, "heads": 2, "layers": 2}
TEXT: dict[str, dict[str, Any]] = {
    "argmax": TRANSFORMER,
    "eos, bias": {**TRANSFORMER, "pool_type": "eos", "eos_id": END, "proj_bias": True},
    "last, not causal": {**TRANSFORMER, "pool_type": "last", "no_causal_mask": True},
    "first, no projection": {**TRANSFORMER, "width": EMBED_DIM, "pool_type": "first", "proj_type": "none"},
}
POOLERS = ("mean_pooler", "cls_pooler", "cls_last_hidden_state_pooler")


def clip(vision: str = "ViT tok", text: str = "argmax", **options: Any) -> CLIP:
    _skip_where_open_clip_lacks(text)
    torch.manual_seed(1)
    return CLIP(_embed_dim(vision), VISION[vision], TEXT[text], **options)


def custom_text_clip(vision: str = "ViT tok", text: str = "argmax", **options: Any) -> CustomTextCLIP:
    _skip_where_open_clip_lacks(text)
    torch.manual_seed(1)
    return CustomTextCLIP(_embed_dim(vision), VISION[vision], TEXT[text], **options)


def hf_clip(folder: Path, pooler: str = "mean_pooler", projection: str = "linear") -> CustomTextCLIP:
    """With a tiny BERT, dropout and all, as its text tower."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertConfig(vocab_size=VOCABULARY, max_position_embeddings=32, pad_token_id=0, **sizes).save_pretrained(folder)
    text = {
        "hf_model_name": str(folder),
        "hf_model_pretrained": False,
        "hf_pooler_type": pooler,
        "hf_proj_type": projection,
    }
    return CustomTextCLIP(EMBED_DIM, VIT, text)


def images_for(model: nn.Module, number: int = 2) -> Tensor:
    height, width = model.visual.image_size
    return torch.randn(number, 3, height, width, generator=torch.Generator().manual_seed(2))


def captions(number: int = 2, pad: int = 0) -> Tensor:
    """Token ids as SimpleTokenizer arranges them: start, 1, 2 ... words, end, padding."""
    texts = torch.full((number, CONTEXT), pad)
    for row in range(number):
        words = list(range(5, 6 + row))
        texts[row, : len(words) + 2] = torch.tensor([START, *words, END])
    return texts


class ToyTokenizer:
    """The ids of `captions`, as open_clip's SimpleTokenizer shows its own."""

    sot_token_id = START
    eot_token_id = END


def hf_tokenizer(folder: Path, template: str | None, **special: str) -> HFTokenizer:
    """open_clip's tokenizer over words, saved in `folder`; `template` puts specials around a caption ("$A")."""
    if open_clip.__version__ < "3.3" and transformers.__version__ >= "5":
        pytest.skip("open_clip's HFTokenizer works with transformers 5 from 3.3.0 on")
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        ids = [(word, vocabulary[word]) for word in SPECIAL]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return HFTokenizer(str(folder), context_length=CONTEXT)


def ids_of(tokenizer: HFTokenizer) -> dict[str, int]:
    return json.loads(tokenizer.tokenizer.backend_tokenizer.to_str())["model"]["vocab"]


def _skip_where_open_clip_lacks(text: str) -> None:
    if text.startswith("eos") and open_clip.__version__ < "3.1":
        pytest.skip("open_clip pools text at an eos from 3.1.0 on")


def _embed_dim(vision: str) -> int:
    # Without a projection of its own the timm tower sets the dimension.
    return 96 if VISION[vision].get("timm_proj") == "none" else EMBED_DIM
