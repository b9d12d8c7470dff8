"""The valid tokens of a tokenized caption, by the conventions of its tokenizer. Needs torch only."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sparc_loss._checks import check_choice

Tokens = Literal["words", "all"]
TOKENS: tuple[Tokens, ...] = ("words", "all")


@dataclass(frozen=True)
class TokenConventions:
    """The special tokens that a tokenizer adds to the words of a caption.

    Every token outside `special_ids` belongs to a word. Every `pad_id` is padding, except those that the tokenizer
    writes as start or end of the words (SigLIP's end is its padding): these are the pad ids nearest to the words. If
    `end_id` is set, everything after the first end is padding, because the pad id is also the id of a word
    (SimpleTokenizer's 0 is a "!" within a word).

    Attributes:
        special_ids: ids that never belong to a word: start, end, separator, padding, language codes and so on.
        end_id: ends the caption; None if `pad_id` marks padding.
        pad_id: fills the context; None if `end_id` marks padding.
        pads_around_words: the number of a row's pad ids that are start or end, not padding.
        padded_left: padding comes before the words.
    """

    special_ids: tuple[int, ...]
    end_id: int | None = None
    pad_id: int | None = None
    pads_around_words: int = 0
    padded_left: bool = False

    def mask(self, texts: Tensor, tokens: Tokens) -> Tensor:
        """The valid tokens of `texts` [B, L] (token ids), bool [B, L].

        "all" is everything but padding; "words" also excludes all other special tokens.
        """
        if self.end_id is not None:
            # Ends seen before a position: 0 up to and with the first end. (A caption cut short keeps its end.)
            is_end = (texts == self.end_id).int()
            valid = is_end.cumsum(dim=-1) - is_end == 0
        else:
            is_pad = torch.eq(texts, self.pad_id if self.pad_id is not None else -1)
            nth_pad = is_pad.flip(-1).cumsum(dim=-1).flip(-1) if self.padded_left else is_pad.cumsum(dim=-1)
            valid = ~is_pad | (nth_pad <= self.pads_around_words)
        if tokens == "words":
            # Not blocking: a copy to the GPU must not wait for the towers' work there.
            special_ids = torch.tensor(self.special_ids).to(texts.device, non_blocking=True)
            valid = valid & ~torch.isin(texts, special_ids)
        return valid


def hf_tokenizer_of(tokenizer: Any) -> Any | None:
    """The Hugging Face tokenizer inside open_clip's HFTokenizer or SigLipTokenizer; None for other tokenizers.

    Raises:
        TypeError: neither a Hugging Face `tokenizer` nor `sot_token_id` and `eot_token_id`.
    """
    hf_tokenizer = getattr(tokenizer, "tokenizer", None)
    # First, because in open_clip 4 HFTokenizer has the other two as well.
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

    Special ids are the tokenizer's own `all_special_ids` without that of the unknown word, and those that it writes
    for an empty caption.

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
    # Calling the tokenizer would reset NLLB's language to its first one.
    around_words = hf_tokenizer.encode("")
    # In this order: an unknown word is a word, unless its id is also that of start or end.
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
