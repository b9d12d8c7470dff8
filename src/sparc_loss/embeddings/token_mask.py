"""Which positions of a tokenized caption count as words, by the tokenizer's own conventions."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from sparc_loss._validation import check_choice

Tokens = Literal["words", "all"]
TOKENS: tuple[Tokens, ...] = ("words", "all")


@dataclass(frozen=True)
class TokenConventions:
    """What a tokenizer puts around the words of a caption.

    Attributes:
        end_id: ends the caption where nothing after it can be a word: the pad id may then be a word's id as well
            (SimpleTokenizer's 0 is a "!" within a word) or the end's own (SigLIP's 1). None where `pad_id` alone
            tells padding.
        pad_id: fills up the context; looked at only where `end_id` is None.
        special_ids: start, end and separator ids, which are no words.
    """

    end_id: int | None
    pad_id: int | None
    special_ids: tuple[int, ...]

    def mask(self, texts: Tensor, tokens: Tokens) -> Tensor:
        """The positions of `texts` [B, L] (token ids) that count, bool [B, L].

        "all" is everything but padding, "words" also leaves out start, end and separators.
        """
        if self.end_id is not None:
            # Ends seen before a position: 0 up to and with the first end. (A caption cut short keeps its end.)
            is_end = (texts == self.end_id).int()
            counts = is_end.cumsum(dim=-1) - is_end == 0
        else:
            counts = texts != self.pad_id
        if tokens == "words":
            for special_id in self.special_ids:
                counts = counts & (texts != special_id)
        return counts


def token_conventions(tokenizer: Any) -> TokenConventions:
    """Read the conventions off an open_clip tokenizer: SimpleTokenizer, HFTokenizer or SigLipTokenizer.

    Raises:
        TypeError: neither `sot_token_id` and `eot_token_id` nor a Hugging Face `tokenizer` in it.
    """
    if hasattr(tokenizer, "sot_token_id") and hasattr(tokenizer, "eot_token_id"):
        start_id, end_id = tokenizer.sot_token_id, tokenizer.eot_token_id
        return TokenConventions(end_id=end_id, pad_id=None, special_ids=(start_id, end_id))

    hf_tokenizer = getattr(tokenizer, "tokenizer", None)
    if not hasattr(hf_tokenizer, "pad_token_id"):
        raise TypeError(
            f"tokenizer is a {type(tokenizer).__name__}; expected what open_clip.get_tokenizer returns "
            "(SimpleTokenizer, HFTokenizer or SigLipTokenizer)"
        )
    names = ("bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id", "pad_token_id")
    special_ids = {getattr(hf_tokenizer, name, None) for name in names} - {None}
    pad_id, end_id = hf_tokenizer.pad_token_id, hf_tokenizer.eos_token_id
    if pad_id is None:
        raise TypeError(f"tokenizer {type(hf_tokenizer).__name__} has no pad_token_id; expected one that pads")
    return TokenConventions(
        end_id=end_id if end_id == pad_id else None, pad_id=pad_id, special_ids=tuple(sorted(special_ids))
    )


def check_tokens(tokens: str) -> None:
    """Raise ValueError unless `tokens` is "words" or "all"."""
    check_choice("tokens", tokens, TOKENS)
