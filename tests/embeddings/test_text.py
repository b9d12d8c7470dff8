"""Token embeddings: last hidden states through the tower's own final norm and projection."""

from pathlib import Path

import pytest
import torch
from tiny_models import (
    CONTEXT,
    CUSTOM_TEXT,
    EMBED_DIM,
    END,
    POOLERS,
    START,
    TEXT,
    ToyTokenizer,
    captions,
    clip,
    coca,
    custom_text_clip,
    hf_clip,
    hf_text,
)
from torch import nn
from torch.testing import assert_close

from sparc_loss import surface_embeddings
from sparc_loss.embeddings.text import forward_with_tokens

MODELS = {
    **{f"CLIP, {text}": lambda _, text=text: clip(text=text) for text in TEXT},
    **{f"TextTransformer, {text}": lambda _, text=text: custom_text_clip(text=text) for text in CUSTOM_TEXT},
    **{f"HF, {pooler}": lambda folder, pooler=pooler: hf_clip(folder, pooler) for pooler in POOLERS},
    "HF, mT5": lambda folder: hf_clip(folder, architecture="google/mt5"),
    "HF, NLLB": lambda folder: hf_clip(folder, "cls_pooler", architecture="facebook/nllb"),
    "HF, mlp": lambda folder: hf_clip(folder, projection="mlp"),
}
COCA = {
    "TextTransformer": lambda _: coca(),
    **{f"HF, {pooler}": lambda folder, pooler=pooler: coca("ViT tok", hf_text(folder, pooler)) for pooler in POOLERS},
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> nn.Module:
    return surface_embeddings(MODELS[request.param](tmp_path), ToyTokenizer()).eval()


def test_the_pooled_feature_is_the_towers_own_bit_for_bit(model: nn.Module) -> None:
    pooled, _ = forward_with_tokens(model, captions())
    assert torch.equal(pooled, model.encode_text(captions()))


@pytest.mark.parametrize("name", COCA)
def test_what_cocas_tower_returns_is_the_towers_own_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = surface_embeddings(COCA[name](tmp_path), ToyTokenizer()).eval()
    (pooled, text_tokens), tokens = forward_with_tokens(model, captions())
    own_pooled, own_text_tokens = model.text(captions())
    assert torch.equal(pooled, own_pooled)
    assert torch.equal(text_tokens, own_text_tokens)
    assert tokens.shape == (2, CONTEXT, EMBED_DIM)


# The token that a tower pools is one of its token embeddings.
POOLED_POSITION = {
    "argmax": captions().argmax(dim=-1),
    "eos, bias": (captions() == END).int().argmax(dim=-1),
    "last, not causal": torch.full((2,), CONTEXT - 1),
    "first, no projection": torch.zeros(2, dtype=torch.long),
}


@pytest.mark.parametrize("make", [clip, custom_text_clip])
@pytest.mark.parametrize("text", TEXT)
def test_the_pooled_token_has_the_pooled_feature_as_its_embedding(make: object, text: str) -> None:
    model = surface_embeddings(make(text=text), ToyTokenizer()).eval()
    tokens, _ = model.encode_tokens(captions())
    assert_close(tokens[torch.arange(2), POOLED_POSITION[text]], model.encode_text(captions()))


def test_a_mean_pooled_bert_pools_the_mean_of_its_token_embeddings(tmp_path: Path) -> None:
    model = surface_embeddings(hf_clip(tmp_path, "mean_pooler"), ToyTokenizer()).eval()
    tokens, _ = model.encode_tokens(captions())
    attended = (captions() != 0)[..., None]
    assert_close((tokens * attended).sum(dim=1) / attended.sum(dim=1), model.encode_text(captions()))


def test_a_class_pooled_bert_pools_its_first_token(tmp_path: Path) -> None:
    model = surface_embeddings(hf_clip(tmp_path, "cls_last_hidden_state_pooler"), ToyTokenizer()).eval()
    tokens, _ = model.encode_tokens(captions())
    assert_close(tokens[:, 0], model.encode_text(captions()))


def test_with_a_class_token_the_others_are_normalised_and_projected_like_it() -> None:
    model = surface_embeddings(custom_text_clip(text="class token"), ToyTokenizer()).eval()
    states = []
    model.text.transformer.register_forward_hook(lambda module, inputs, output: states.append(output))
    tokens, _ = model.encode_tokens(captions())
    embeddings = model.text.ln_final(states[0]) @ model.text.text_projection
    assert_close(tokens, embeddings[:, :CONTEXT])
    assert_close(model.encode_text(captions()), embeddings[:, CONTEXT])


@pytest.mark.parametrize("pooler", POOLERS)
@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_whatever_a_bert_pools_its_tokens_are_its_projected_last_hidden_states(
    pooler: str, projection: str, tmp_path: Path
) -> None:
    model = surface_embeddings(hf_clip(tmp_path, pooler, projection), ToyTokenizer()).eval()
    hidden = model.text.transformer(input_ids=captions(), attention_mask=(captions() != 0).long()).last_hidden_state
    assert_close(model.encode_tokens(captions())[0], model.text.proj(hidden))


@pytest.mark.parametrize("make", [clip, custom_text_clip])
def test_in_a_causal_tower_a_word_sees_only_what_stands_before_it(make: object) -> None:
    model = surface_embeddings(make(), ToyTokenizer()).eval()
    texts = torch.tensor([[START, 5, 6, 7, END, 0, 0, 0]])
    changed = texts.clone()
    changed[0, 3] = 20
    before, after = (model.encode_tokens(ids)[0][0] for ids in (texts, changed))
    assert torch.equal(after[:3], before[:3])
    assert not torch.equal(after[3], before[3])


def test_padding_does_not_reach_the_words_of_a_bert(tmp_path: Path) -> None:
    model = surface_embeddings(hf_clip(tmp_path), ToyTokenizer()).eval()
    texts = captions(1)
    longer = torch.cat([texts, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    length = (texts != 0).sum()
    assert_close(model.encode_tokens(longer)[0][:, :length], model.encode_tokens(texts)[0][:, :length])
