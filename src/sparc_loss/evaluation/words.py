"""Which token embeddings are those of a word of a caption. Importing this imports open_clip."""

from collections.abc import Callable

import torch
from torch import Tensor

from sparc_loss.embeddings.token_mask import token_conventions


def word_positions(tokenizer: Callable[[list[str]], Tensor], caption: str) -> list[list[int]]:
    """The positions of each word's tokens in the tokenized caption, one list per word of `caption.split()`.

    A tokenizer may split a word into several tokens, punctuation into tokens of its own, which go with the word they
    stand at, and leave a word out: the list is empty for words that it drops or that lie beyond its context.

    Args:
        tokenizer: the model's own, from `open_clip.get_tokenizer`.
        caption: words between white space.

    Raises:
        TypeError: a tokenizer whose conventions are not known.
        ValueError: the tokenizer reads the beginning of the caption otherwise than the whole (a language written
            without spaces, say), so that no token is a certain word's.
    """
    words = caption.split()
    prefixes = [" ".join(words[:stop]) for stop in range(1, len(words) + 1)]
    if not prefixes:
        return []
    ids = tokenizer(prefixes)
    mask = token_conventions(tokenizer).mask(ids, "words")
    whole = mask[-1].nonzero().flatten().tolist()
    positions, start = [], 0
    for stop, prefix in enumerate(prefixes):
        count = int(mask[stop].sum())
        if not torch.equal(ids[stop][mask[stop]], ids[-1][whole[:count]]) or count < start:
            raise ValueError(
                f"caption {caption!r}: its beginning {prefix!r} is tokenized otherwise on its own; "
                "expected a tokenizer and a language that keep the words apart"
            )
        positions.append(whole[start:count])
        start = count
    return positions
