"""Every model that open_clip lists, whole, on the meta device: names, shapes, the grid. conftest prints the count."""

from unittest.mock import patch

import open_clip
import pytest
import torch
from major_version import only_open_clip_3
from model_families import text_family, vision_family
from open_clip.factory import get_model_config
from open_clip.model import _build_text_tower
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from open_clip.utils import to_2tuple
from tiny_models import CUSTOM_TEXT, HF_CONFIGS, TEXT, VISION, ToyTokenizer
from torch import nn
from transformers import M2M100Config, ModernBertConfig, MT5Config, RobertaConfig, XLMRobertaConfig

from sparc_loss import restore, surface_embeddings
from sparc_loss.embeddings.vision import patch_size

pytestmark = pytest.mark.exhaustive

# What the hub would answer, as wide as open_clip reckons with, but one layer and a small vocabulary: transformers
# reads values off the attention mask, which the meta device has none of, so these text towers run on the CPU.
ONE_LAYER = {"vocab_size": 64, "num_hidden_layers": 1}
HF_HUB = {
    "roberta-base": RobertaConfig(**ONE_LAYER),
    "xlm-roberta-base": XLMRobertaConfig(**ONE_LAYER),
    "xlm-roberta-large": XLMRobertaConfig(**ONE_LAYER, hidden_size=1024, num_attention_heads=16),
    "Alibaba-NLP/gte-modernbert-base": ModernBertConfig(**ONE_LAYER, pad_token_id=0),
    "google/mt5-base": MT5Config(vocab_size=64, num_layers=1, d_model=768, num_heads=12),
    "google/mt5-xl": MT5Config(vocab_size=64, num_layers=1, d_model=2048, num_heads=32),
    "facebook/nllb-200-distilled-600M": M2M100Config(vocab_size=64, encoder_layers=1, decoder_layers=1),
    "facebook/nllb-200-distilled-1.3B": M2M100Config(vocab_size=64, encoder_layers=1, decoder_layers=1),
}


def stride(visual: nn.Module) -> int:
    """How many pixels lie under the side of one place of the tower's grid, by what the tower says of itself."""
    if isinstance(visual, VisionTransformer):
        return visual.patch_size[0]
    return 32 if isinstance(visual, ModifiedResNet) else visual.trunk.feature_info[-1]["reduction"]


def pairs_images_with_texts(name: str) -> bool:
    """Not so in open_clip 4: models of sounds, and generative ones."""
    config = get_model_config(name)
    return "vision_cfg" in config and "genlip_cfg" not in config


@pytest.mark.parametrize("name", filter(pairs_images_with_texts, open_clip.list_models()))
def test_every_model_surfaces_its_patches_and_tokens(name: str) -> None:
    config = get_model_config(name)
    text_cfg = {**config["text_cfg"], "hf_model_pretrained": False}
    texts = torch.full((2, text_cfg.get("context_length", 77)), 5, device="meta")
    with patch.object(open_clip.hf_model.AutoConfig, "from_pretrained", HF_HUB.__getitem__):
        with torch.device("meta"):
            model = open_clip.create_model(name, device="meta", pretrained_hf=False)
        if "hf_model_name" in text_cfg:
            model.text, texts = _build_text_tower(config["embed_dim"], text_cfg), torch.full(texts.shape, 5)
    names, plain = list(model.state_dict()), type(model)
    surface_embeddings(model.eval(), ToyTokenizer())
    height, width = to_2tuple(model.visual.image_size)
    images = torch.empty(2, 3, height, width, device="meta")

    patches, grid = model.encode_patches(images)
    tokens, mask = model.encode_tokens(texts)

    side = stride(model.visual)
    assert grid == (height // side, width // side)
    # Also where that leaves pixels out: a patch of 14 at 384 pixels.
    assert patch_size(model.visual, (height, width), grid) == (side, side)
    assert patches.shape == (2, grid[0] * grid[1], config["embed_dim"])
    assert tokens.shape == (*texts.shape, config["embed_dim"])
    assert mask.shape == texts.shape
    assert list(model.state_dict()) == names
    assert type(restore(model)) is plain


def configs() -> list[dict]:
    return [get_model_config(name) for name in open_clip.list_models()]


@only_open_clip_3
def test_every_family_of_vision_towers_has_a_tiny_model() -> None:
    assert {vision_family(config) for config in configs()} <= {
        vision_family({"vision_cfg": vision}) for vision in VISION.values()
    }


@only_open_clip_3
def test_every_family_of_text_towers_has_a_tiny_model() -> None:
    tiny = [{"text_cfg": text} for text in TEXT.values()]
    tiny += [{"text_cfg": text, "custom_text": True} for text in CUSTOM_TEXT.values()]
    tiny += [{"text_cfg": {"hf_model_name": name}} for name in HF_CONFIGS]
    assert {text_family(config) for config in configs()} <= {text_family(config) for config in tiny}
