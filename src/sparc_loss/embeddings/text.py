"""Token embeddings of open_clip's text towers, from the same pass as the pooled feature.

A token embedding is the tower's last hidden state after its own final norm and projection, without new parameters. One
function per kind of tower, each mirroring that tower's forward in open_clip/model.py, open_clip/transformer.py or
open_clip/hf_model.py; the tests hold what the tower itself returns to it bit for bit.
"""

from typing import Any

from open_clip import CLIP
from open_clip.hf_model import ClsPooler, HFTextEncoder, MaxPooler
from open_clip.transformer import TextTransformer, text_global_pool
from torch import Tensor, nn

try:
    from open_clip.transformer import ModernTextTransformer
except ImportError:  # open_clip before 4
    ModernTextTransformer = ()


def forward_with_tokens(model: Any, texts: Tensor) -> tuple[Any, Tensor]:
    """One pass of the model's text tower over token ids [B, L].

    Returns:
        What the tower itself returns: the pooled feature [B, D], or it and CoCa's text tokens.
        The token embeddings [B, L, D], one for each id; CoCa's class token is left out.
    """
    # CLIP has no text tower to call: it keeps the tower's parts in itself (open_clip/model.py, CLIP.encode_text).
    return _clip_text(model, texts) if isinstance(model, CLIP) else tower_with_tokens(model.text, texts)


def tower_with_tokens(text: Any, texts: Tensor) -> tuple[Any, Tensor]:
    """`forward_with_tokens` of the text tower of a CustomTextCLIP or CoCa."""
    if isinstance(text, TextTransformer):
        return _text_transformer(text, texts)
    if isinstance(text, ModernTextTransformer):
        return _modern_text_transformer(text, texts)
    return _hf_text_encoder(text, texts)


def check_text_tower(model: Any) -> None:
    """Raise TypeError, naming the tower, unless its token embeddings are known."""
    if isinstance(model, CLIP) or isinstance(model.text, (TextTransformer, ModernTextTransformer)):
        return
    found = type(model.text).__name__
    if isinstance(model.text, HFTextEncoder):
        if not isinstance(model.text.pooler, MaxPooler):
            return
        found = "HFTextEncoder with a max_pooler, whose forward fails in open_clip 3"
    raise TypeError(
        f"model.text is a {found}; token embeddings are known for CLIP's own text tower, TextTransformer, "
        "ModernTextTransformer and HFTextEncoder with a mean_pooler, cls_pooler or cls_last_hidden_state_pooler"
    )


def _clip_text(model: CLIP, texts: Tensor) -> tuple[Tensor, Tensor]:
    dtype = model.transformer.get_cast_dtype()
    tokens = model.token_embedding(texts).to(dtype) + model.positional_embedding.to(dtype)
    tokens = model.ln_final(model.transformer(tokens, attn_mask=model.attn_mask))
    pooled = _pool(tokens, texts, model.text_pool_type, getattr(model, "text_eos_id", None))
    return _project(pooled, model.text_projection), _project(tokens, model.text_projection)


def _text_transformer(text: TextTransformer, texts: Tensor) -> tuple[Any, Tensor]:
    states, attention_mask = text._embeds(texts)
    states = text.transformer(states, attn_mask=attention_mask)
    if text.cls_emb is not None:
        # CoCa's class token is the last one and is pooled before the norm.
        pooled, states = text.ln_final(states[:, -1]), states[:, :-1]
        tokens = text.ln_final(states)
    else:
        states = tokens = text.ln_final(states)
        pooled = _pool(tokens, texts, text.pool_type, getattr(text, "eos_id", None))
    pooled = _project(pooled, text.text_projection)
    return (pooled, states) if text.output_tokens else pooled, _project(tokens, text.text_projection)


def _modern_text_transformer(text: Any, texts: Tensor) -> tuple[Any, Tensor]:
    states, valid, _ = text._encode_tokens(texts)
    states = text.ln_final(states)[:, text.num_reg :]
    pooled = _project(text.pool(states, text=texts, valid=valid, eos_id=text.eos_id), text.text_projection)
    # The softmax over a single key is 1: where the pool attends, a token alone gets its value.
    tokens = text.pool.kv(states).chunk(2, dim=-1)[1] if text.pool.pool_type == "map" else states
    return (pooled, states) if text.cfg.output_tokens else pooled, _project(tokens, text.text_projection)


def _hf_text_encoder(text: HFTextEncoder, texts: Tensor) -> tuple[Any, Tensor]:
    attention_mask = (texts != text.config.pad_token_id).long()
    output = text.transformer(input_ids=texts, attention_mask=attention_mask)
    pooled, states = text.proj(text.pooler(output, attention_mask)), output.last_hidden_state
    tokens = text.proj(states)
    if not text.output_tokens:
        return pooled, tokens
    return (pooled, states[:, 1:] if type(text.pooler) is ClsPooler else states), tokens


def _pool(tokens: Tensor, texts: Tensor, pool_type: str, eos_id: int | None) -> Tensor:
    # open_clip 3.0 knows neither the 'eos' pool nor its argument.
    eos = {"eos_token_id": eos_id} if pool_type == "eos" else {}
    return text_global_pool(tokens, texts, pool_type, **eos)


def _project(features: Tensor, projection: nn.Module | Tensor | None) -> Tensor:
    if projection is None:
        return features
    return projection(features) if isinstance(projection, nn.Module) else features @ projection
