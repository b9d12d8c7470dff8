"""Which positions of a tokenized caption count as words, by the tokenizer's own conventions."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sparc_loss._checks import check_choice

Tokens = Literal["words", "all"]
TOKENS: tuple[Tokens, ...] = ("words", "all")


@dataclass(frozen=True)
class TokenConventions:
    """What a tokenizer puts around the words of a caption.

    A word is every token outside `special_ids`. Padding is every `pad_id`, but for those that the tokenizer writes
    around the words as their start or end (SigLIP's end is its padding): of a row's pad ids, the ones nearest the
    words. Where `end_id` is set, padding is what comes after the first end instead, because the pad id is a word's as
    well (SimpleTokenizer's 0 is a "!" within a word).

    Attributes:
        special_ids: ids that are never a word's: start, end, separator, padding, language codes and the like.
        end_id: ends the caption; None where `pad_id` tells padding.
        pad_id: fills up the context; None where `end_id` tells padding.
        pads_around_words: how many of a row's pad ids are start or end, not padding.
        padded_left: padding comes before the words.
    """

    special_ids: tuple[int, ...]
    end_id: int | None = None
    pad_id: int | None = None
    pads_around_words: int = 0
    padded_left: bool = False

    def mask(self, texts: Tensor, tokens: Tokens) -> Tensor:
        """The positions of `texts` [B, L] (token ids) that count, bool [B, L].

        "all" is everything but padding, "words" also leaves out every other special token.
        """
        if self.end_id is not None:
            # Ends seen before a position: 0 up to and with the first end. (A caption cut short keeps its end.)
            is_end = (texts == self.end_id).int()
            counts = is_end.cumsum(dim=-1) - is_end == 0
        else:
            is_pad = torch.eq(texts, self.pad_id if self.pad_id is not None else -1)
            nth_pad = is_pad.flip(-1).cumsum(dim=-1).flip(-1) if self.padded_left else is_pad.cumsum(dim=-1)
            counts = ~is_pad | (nth_pad <= self.pads_around_words)
        if tokens == "words":
            # Not blocking: a copy to the GPU must not wait for the towers' work there.
            special_ids = torch.tensor(self.special_ids).to(texts.device, non_blocking=True)
            counts = counts & ~torch.isin(texts, special_ids)
        return counts


def hf_tokenizer_of(tokenizer: Any) -> Any | None:
    """The Hugging Face tokenizer in open_clip's HFTokenizer or SigLipTokenizer; None for one that has none in it.

    Raises:
        TypeError: neither a Hugging Face `tokenizer` nor `sot_token_id` and `eot_token_id`.
    """
    hf_tokenizer = getattr(tokenizer, "tokenizer", None)
    # First, because from open_clip 4 on HFTokenizer has the other two as well.
    if hasattr(hf_tokenizer, "pad_token_id"):
        return hf_tokenizer
    if hf_tokenizer is None and hasattr(tokenizer, "sot_token_id") and hasattr(tokenizer, "eot_token_id"):
        return None
    raise TypeError(
        f"tokenizer is a {type(tokenizer).__name__}; expected what open_clip.get_tokenizer returns "
        "(SimpleTokenizer, HFTokenizer, SigLipTokenizer or TikTokenTokenizer)"
    )


def token_conventions(tokenizer: Any) -> TokenConventions:
    """Read the conventions off an open_clip tokenizer: Simple-, HF-, SigLip- or TikTokenTokenizer.

    Special are the tokenizer's own `all_special_ids`, less the unknown word's, and what it writes around an empty
    caption.

    Raises:
        TypeError: neither `sot_token_id` and `eot_token_id` nor a Hugging Face `tokenizer` in it; or one without a
            padding token.
    """
    hf_tokenizer = hf_tokenizer_of(tokenizer)
    if hf_tokenizer is None:
        start_id, end_id = tokenizer.sot_token_id, tokenizer.eot_token_id
        special_ids = tuple(sorted({start_id, end_id, *getattr(tokenizer, "all_special_ids", ())}))
        if getattr(tokenizer, "pad_token_id", None) is not None:  # TikTokenTokenizer, which need not write an end
            return TokenConventions(special_ids=special_ids, pad_id=tokenizer.pad_token_id)
        return TokenConventions(special_ids=special_ids, end_id=end_id)

    pad_id = hf_tokenizer.pad_token_id
    if pad_id is None:
        raise TypeError(f"tokenizer {type(hf_tokenizer).__name__} has no pad_token_id; expected one that pads")
    # Not by calling the tokenizer, which would put NLLB's language back to its first.
    around_words = hf_tokenizer.encode("")
    # In this order: an unknown word is a word, but not where the same id is also written as start or end.
    specials = {*hf_tokenizer.all_special_ids} - {hf_tokenizer.unk_token_id} | {*around_words}
    return TokenConventions(
        special_ids=tuple(sorted(specials)),
        pad_id=pad_id,
        pads_around_words=around_words.count(pad_id),
        padded_left=hf_tokenizer.padding_side == "left",
    )


def check_tokens(tokens: str) -> None:
    """Raise ValueError unless `tokens` is "words" or "all"."""
    check_choice("tokens", tokens, TOKENS)
