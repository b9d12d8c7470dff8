"""How good and how faithful captions are: CIDEr and K-Precision."""

import math
import statistics
from collections.abc import Collection, Sequence

from pycocoevalcap.cider.cider import Cider

from sparc_loss.evaluation import text_k_precision
from sparc_loss.evaluation.faithfulness import caption_words

CIDER_MAXIMUM = 10.0


def caption_scores(
    generated: Sequence[str], references: Sequence[Sequence[str]], seen_words: Collection[str] | None = None
) -> dict[str, float | None]:
    """CIDEr and K-Precision, and CIDEr if every image had the caption of the next.

    Args:
        generated: a caption per image.
        references: the captions of each image.
        seen_words: nouns and adjectives, of which K-Precision is taken too.

    Returns:
        CIDEr in [0, 10] (papers print it times 100, the maximum of which is 1000), K-Precision in [0, 1].
    """
    others = [*generated[1:], *generated[:1]]
    scores: dict[str, float | None] = {
        "CIDEr": cider(generated, references),
        "CIDEr of other images": cider(others, references),
        "K-Precision": _k_precision(generated, references, None),
    }
    if seen_words is not None:
        scores["K-Precision, nouns and adjectives"] = _k_precision(generated, references, seen_words)
    return scores


def cider(generated: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D by pycocoevalcap, whose CIDEr needs no Java.

    Words are those of `caption_words`: its own tokenizer, which does need Java, also takes lower case and no
    punctuation.

    Raises:
        ValueError: fewer than two images; words are weighted by how few images have them.
    """
    if len(generated) < 2:
        raise ValueError(
            f"CIDEr is asked of {len(generated)} image; expected two or more, as it weighs words by images"
        )
    plain = {image: [_plain(caption)] for image, caption in enumerate(generated)}
    true = {image: [_plain(caption) for caption in captions] for image, captions in enumerate(references)}
    return float(Cider().compute_score(true, plain)[0])


def _k_precision(
    generated: Sequence[str], references: Sequence[Sequence[str]], counts: Collection[str] | None
) -> float | None:
    """The mean over the captions that have a word that counts; None if no caption has one."""
    of_each = [text_k_precision(text, own, counts) for text, own in zip(generated, references, strict=True)]
    known = [precision for precision in of_each if not math.isnan(precision)]
    return statistics.fmean(known) if known else None


def _plain(caption: str) -> str:
    return " ".join(caption_words(caption))
