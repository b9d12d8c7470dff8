"""Tiny untrained open_clip models of every kind that can be surfaced, and tokenizers made here."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import open_clip
import pytest
import timm
import torch
from open_clip import CLIP, CoCa, CustomTextCLIP
from open_clip.utils import to_2tuple
from torch import Tensor, nn
from transformers import (
    BertConfig,
    M2M100Config,
    MT5Config,
    PretrainedConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

EMBED_DIM, CONTEXT, VOCABULARY = 16, 8, 64
START, END = VOCABULARY - 2, VOCABULARY - 1

VIT = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": (16, 24)}
ATTENTIONAL = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4}
TIMM_VIT = {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": (32, 48)}
# What makes timm's models small; open_clip builds them by name alone.
SHRUNKEN: dict[str, dict[str, Any]] = {
    "vit_base_patch16_siglip_224": TIMM_VIT,
    "vit_large_patch14_clip_224": {**TIMM_VIT, "img_size": (28, 42)},
    "vit_medium_patch16_gap_256": TIMM_VIT,
    "vit_relpos_medium_patch16_cls_224": TIMM_VIT,
    "vit_base_mci_224": {"depth": 1, "img_size": (32, 48)},
    "vitamin_small_224": {"depth": 1, "img_size": (32, 48)},
    "eva02_base_patch16_clip_224": TIMM_VIT,
    "vit_pe_core_tiny_patch16_384": TIMM_VIT,
    "vit_pe_core_gigantic_patch14_448": {**TIMM_VIT, "img_size": (28, 42)},
    "convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "fastvit_mci0": {"layers": (1, 1, 1, 1), "embed_dims": (32, 32, 64, 64)},
    "swin_base_patch4_window7_224": {
        "embed_dim": 8,
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 1, 1, 1),
        "img_size": (128, 160),
    },
}


def _timm(name: str, pool: str = "", proj: str | None = "linear", **options: Any) -> dict[str, Any]:
    image_size = SHRUNKEN.get(name, {}).get("img_size", (128, 160))
    return {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": image_size, **options}


VISION: dict[str, dict[str, Any]] = {
    "ViT tok": VIT,
    "ViT avg": {**VIT, "pool_type": "avg"},
    "ViT tok, final_ln_after_pool": {**VIT, "final_ln_after_pool": True},
    "ViT avg, final_ln_after_pool": {**VIT, "pool_type": "avg", "final_ln_after_pool": True},
    "ViT attentional": {**VIT, **ATTENTIONAL},
    "ViT attentional, same width": {**VIT, **ATTENTIONAL, "width": 16, "head_width": 8},
    "ModifiedResNet": {"layers": (1, 1, 1, 1), "width": 8, "head_width": 8, "image_size": 128},
    "timm ViT map": _timm("vit_base_patch16_siglip_224", "map", "none"),
    "timm ViT map, linear": _timm("vit_base_patch16_siglip_224", "map"),
    "timm ViT token": _timm("vit_large_patch14_clip_224", "token", None),
    "timm ViT avg, fc_norm": _timm("vit_large_patch14_clip_224", "avg", "mlp"),
    "timm ViT gap": _timm("vit_medium_patch16_gap_256"),
    "timm ViT relpos": _timm("vit_relpos_medium_patch16_cls_224"),
    "timm ViT MobileCLIP": _timm("vit_base_mci_224", "token", None),
    "timm ViT ViTamin": _timm("vitamin_small_224"),
    "Eva": _timm("eva02_base_patch16_clip_224", "token", None),
    "Eva PE": _timm("vit_pe_core_tiny_patch16_384", "map", None),
    "Eva PE, no class token": _timm("vit_pe_core_gigantic_patch14_448", "map", None),
    "ConvNeXt": _timm("convnext_tiny"),
    "ConvNeXt, mlp": _timm("convnext_tiny", proj="mlp"),
    "FastViT": _timm("fastvit_mci0", "avg", None),
    "Swin": _timm("swin_base_patch4_window7_224"),
}
# Height and width of the grid of patches; (2, 3) where not named.
GRIDS = {"ModifiedResNet": (4, 4), "ConvNeXt": (4, 5), "ConvNeXt, mlp": (4, 5), "FastViT": (4, 5), "Swin": (4, 5)}
TRANSFORMER = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 32, "heads": 2, "layers": 2}
TEXT: dict[str, dict[str, Any]] = {
    "argmax": TRANSFORMER,
    "eos, bias": {**TRANSFORMER, "pool_type": "eos", "eos_id": END, "proj_bias": True},
    "last, not causal": {**TRANSFORMER, "pool_type": "last", "no_causal_mask": True},
    "first, no projection": {**TRANSFORMER, "width": EMBED_DIM, "pool_type": "first", "proj_type": "none"},
}
# What TextTransformer can be and CLIP's own text tower cannot.
CUSTOM_TEXT = {**TEXT, "class token": {**TRANSFORMER, "embed_cls": True}}
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
POOLERS = ("mean_pooler", "cls_pooler", "cls_last_hidden_state_pooler")


def clip(vision: str = "ViT tok", text: str = "argmax", **options: Any) -> CLIP:
    return _build(CLIP, _embed_dim(vision), VISION[vision], _text(text), **options)


def custom_text_clip(vision: str = "ViT tok", text: str = "argmax", **options: Any) -> CustomTextCLIP:
    return _build(CustomTextCLIP, _embed_dim(vision), VISION[vision], _text(text), **options)


def coca(vision: str = "ViT attentional", text: dict[str, Any] | None = None, **options: Any) -> CoCa:
    """open_clip's CoCa, whose towers return their tokens as well, for the decoder; both as wide as the decoder."""
    # The attentional pooler projects the image tokens; without it they keep the tower's width.
    width = EMBED_DIM if VISION[vision].get("attentional_pool") else VISION[vision]["width"]
    text = text or {**CUSTOM_TEXT["class token"], "width": width}
    decoder = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": width, "heads": 2, "layers": 1}
    towers = {**text, "output_tokens": True}, {**VISION[vision], "output_tokens": True}
    model = _build(CoCa, EMBED_DIM, decoder, *towers, **options)
    # open_clip leaves this one to whatever the memory held.
    nn.init.normal_(model.text_decoder.text_projection, std=width**-0.5)
    return model


def _build(model_class: type[nn.Module], *configs: Any, **options: Any) -> Any:
    create_model = timm.create_model

    def create_shrunken(name: str, **arguments: Any) -> nn.Module:
        return create_model(name, **arguments, **SHRUNKEN.get(name, {}))

    torch.manual_seed(1)
    with patch.object(timm, "create_model", create_shrunken):
        model = model_class(*configs, **options)
    for parameter in model.parameters():
        # What starts at zero (biases, the last norm of a residual block) would hide mistakes.
        if parameter.dim() > 0 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


# By the start of the name that open_clip's configurations give: what their Hugging Face text towers are.
HF_CONFIGS: dict[str, PretrainedConfig] = {
    "roberta": RobertaConfig(**_ENCODER, pad_token_id=0),
    "xlm-roberta": XLMRobertaConfig(**_ENCODER, pad_token_id=0),
    "google/mt5": MT5Config(vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2),
    "facebook/nllb": M2M100Config(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=32,
        pad_token_id=0,
    ),
    "bert": BertConfig(**_ENCODER, pad_token_id=0),
}


def hf_text(
    folder: Path, pooler: str = "mean_pooler", projection: str = "linear", architecture: str = "bert"
) -> dict[str, Any]:
    """The configuration of a tiny Hugging Face text tower, dropout and all, saved in `folder`."""
    HF_CONFIGS[architecture].save_pretrained(folder)
    return {
        "hf_model_name": str(folder),
        "hf_model_pretrained": False,
        "hf_pooler_type": pooler,
        "hf_proj_type": projection,
    }


def hf_clip(folder: Path, *options: str, **named_options: str) -> CustomTextCLIP:
    """With a Hugging Face text tower; the options are those of `hf_text`."""
    return _build(CustomTextCLIP, EMBED_DIM, VIT, hf_text(folder, *options, **named_options))


def images_for(model: nn.Module, number: int = 2) -> Tensor:
    height, width = to_2tuple(model.visual.image_size)
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


def _text(name: str) -> dict[str, Any]:
    if name.startswith("eos") and open_clip.__version__ < "3.1":
        pytest.skip("open_clip pools text at an eos from 3.1.0 on")
    return CUSTOM_TEXT[name]


def _embed_dim(vision: str) -> int:
    # Without a projection of its own the timm tower sets the dimension.
    return TIMM_VIT["embed_dim"] if VISION[vision].get("timm_proj") == "none" else EMBED_DIM
