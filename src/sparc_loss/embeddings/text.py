"""Token embeddings of open_clip's text towers, from the same pass as the pooled feature.

A token embedding is the tower's last hidden state through its own final norm and projection, no new parameter. One
function per kind of tower, each mirroring that tower's forward in open_clip/model.py, open_clip/transformer.py or
open_clip/hf_model.py; the tests hold the pooled feature to it bit for bit.
"""

from open_clip import CLIP
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import TextTransformer, text_global_pool
from torch import Tensor, nn


def encode_pooled_and_tokens(model: nn.Module, texts: Tensor) -> tuple[Tensor, Tensor]:
    """One pass of the text tower: pooled feature [B, D], as `model.encode_text(texts)` gives it, and [B, L, D]."""
    if isinstance(model, CLIP):
        return _clip_text(model, texts)
    if isinstance(model.text, TextTransformer):
        return _text_transformer(model.text, texts)
    return _hf_text_encoder(model.text, texts)


def check_text_tower(model: nn.Module) -> None:
    """Raise TypeError, naming the tower, unless its token embeddings are known."""
    if isinstance(model, CLIP):
        return
    text = model.text
    if isinstance(text, HFTextEncoder) or (isinstance(text, TextTransformer) and text.cls_emb is None):
        return
    found = "TextTransformer with a class embedding" if isinstance(text, TextTransformer) else type(text).__name__
    raise TypeError(
        f"model.text is a {found}; token embeddings are known for CLIP's own text tower, TextTransformer "
        "without a class embedding, and HFTextEncoder"
    )


def _clip_text(model: CLIP, texts: Tensor) -> tuple[Tensor, Tensor]:
    # CLIP keeps the text tower's parts in itself (open_clip/model.py, CLIP.encode_text).
    dtype = model.transformer.get_cast_dtype()
    tokens = model.token_embedding(texts).to(dtype) + model.positional_embedding.to(dtype)
    tokens = model.ln_final(model.transformer(tokens, attn_mask=model.attn_mask))
    pooled = _pool(tokens, texts, model.text_pool_type, getattr(model, "text_eos_id", None))
    return _project(pooled, model.text_projection), _project(tokens, model.text_projection)


def _text_transformer(text: TextTransformer, texts: Tensor) -> tuple[Tensor, Tensor]:
    tokens, attention_mask = text._embeds(texts)
    tokens = text.ln_final(text.transformer(tokens, attn_mask=attention_mask))
    pooled = _pool(tokens, texts, text.pool_type, getattr(text, "eos_id", None))
    return _project(pooled, text.text_projection), _project(tokens, text.text_projection)


def _hf_text_encoder(text: HFTextEncoder, texts: Tensor) -> tuple[Tensor, Tensor]:
    attention_mask = (texts != text.config.pad_token_id).long()
    output = text.transformer(input_ids=texts, attention_mask=attention_mask)
    return text.proj(text.pooler(output, attention_mask)), text.proj(output.last_hidden_state)


def _pool(tokens: Tensor, texts: Tensor, pool_type: str, eos_id: int | None) -> Tensor:
    # open_clip 3.0 knows neither the 'eos' pool nor its argument.
    eos = {"eos_token_id": eos_id} if pool_type == "eos" else {}
    return text_global_pool(tokens, texts, pool_type, **eos)


def _project(features: Tensor, projection: nn.Module | Tensor | None) -> Tensor:
    if projection is None:
        return features
    return projection(features) if isinstance(projection, nn.Module) else features @ projection
