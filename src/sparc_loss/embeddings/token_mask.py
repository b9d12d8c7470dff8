"""Which positions of a tokenized caption count as words, by the tokenizer's own conventions."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sparc_loss._validation import check_choice

Tokens = Literal["words", "all"]
TOKENS: tuple[Tokens, ...] = ("words", "all")


@dataclass(frozen=True)
class TokenConventions:
    """What a tokenizer puts around the words of a caption.

    Attributes:
        special_ids: what is no word: start, end, separator, padding, language code. The unknown word is a word.
        pad_id: fills up the context, where its id tells it from everything else; else None.
        end_id: ends the caption where padding is not told by its id: SimpleTokenizer's 0 is also a "!" within a word,
            SigLIP's 1 also the end itself. None where `pad_id` tells it.
        pads_left: whether the context is filled up before the caption.
    """

    special_ids: tuple[int, ...]
    pad_id: int | None
    end_id: int | None = None
    pads_left: bool = False

    def mask(self, texts: Tensor, tokens: Tokens) -> Tensor:
        """The positions of `texts` [B, L] (token ids) that count, bool [B, L].

        "all" is everything but padding, "words" also leaves out the special ids.
        """
        if self.end_id is None:
            counts = texts != self.pad_id
        elif self.pads_left:
            counts = texts != self.end_id
            counts[:, -1] = True
        else:
            # Ends seen before a position: 0 up to and with the first end. (A caption cut short keeps its end.)
            is_end = (texts == self.end_id).int()
            counts = is_end.cumsum(dim=-1) - is_end == 0
        if tokens == "words":
            counts = counts & ~torch.isin(texts, torch.tensor(self.special_ids, device=texts.device))
        return counts


def token_conventions(tokenizer: Any) -> TokenConventions:
    """Read the conventions off an open_clip tokenizer: SimpleTokenizer, HFTokenizer or SigLipTokenizer.

    Special ids are those the tokenizer calls special, but for the unknown word. Padding is what has the pad id; where
    the end has it too, only the end next to the caption is the end.

    Raises:
        TypeError: neither `sot_token_id` and `eot_token_id` nor a Hugging Face `tokenizer` that pads in it.
    """
    if hasattr(tokenizer, "sot_token_id") and hasattr(tokenizer, "eot_token_id"):
        special_ids = {tokenizer.sot_token_id, tokenizer.eot_token_id, *getattr(tokenizer, "all_special_ids", ())}
        return TokenConventions(tuple(sorted(special_ids)), pad_id=None, end_id=tokenizer.eot_token_id)

    hf_tokenizer = getattr(tokenizer, "tokenizer", None)
    if not hasattr(hf_tokenizer, "pad_token_id"):
        raise TypeError(
            f"tokenizer is a {type(tokenizer).__name__}; expected what open_clip.get_tokenizer returns "
            "(SimpleTokenizer, HFTokenizer or SigLipTokenizer)"
        )
    pad_id, end_id = hf_tokenizer.pad_token_id, hf_tokenizer.eos_token_id
    if pad_id is None:
        raise TypeError(f"tokenizer {type(hf_tokenizer).__name__} has no pad_token_id; expected one that pads")
    # The unknown word is among the special ids but is a word, unless it plays another part as well (GPT-2).
    parts = ("bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id", "pad_token_id")
    special_ids = {*hf_tokenizer.all_special_ids} - {hf_tokenizer.unk_token_id}
    special_ids |= {getattr(hf_tokenizer, part) for part in parts} - {None}
    pads_with_its_end = pad_id == end_id and end_id in hf_tokenizer("")["input_ids"]
    return TokenConventions(
        tuple(sorted(special_ids)),
        pad_id=None if pads_with_its_end else pad_id,
        end_id=end_id if pads_with_its_end else None,
        pads_left=hf_tokenizer.padding_side == "left",
    )


def check_tokens(tokens: str) -> None:
    """Raise ValueError unless `tokens` is "words" or "all"."""
    check_choice("tokens", tokens, TOKENS)
