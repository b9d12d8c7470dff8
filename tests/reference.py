"""The objective once more, slowly: loops, one token and one patch at a time, in Python's own float64.

Written from the paper's equations, sharing no line with the library; the library is held against it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Vector = Sequence[float]


def dot(left: Vector, right: Vector) -> float:
    return math.fsum(x * y for x, y in zip(left, right, strict=True))


def cosine(left: Vector, right: Vector) -> float:
    norms = math.sqrt(dot(left, left)) * math.sqrt(dot(right, right))
    return dot(left, right) / norms if norms > 0 else 0.0


def token_weights(token: Vector, patches: Sequence[Vector], threshold: float | None, method: str) -> list[float]:
    """Eqs. 2 to 4 for one token and the patches it may use."""
    similarity = [dot(token, patch) for patch in patches]
    lowest, highest = min(similarity), max(similarity)
    if method == "softmax":
        scores = [math.exp(s - highest) for s in similarity]
    elif highest == lowest:
        scores = [1.0 for _ in similarity]
    else:
        scores = [(s - lowest) / (highest - lowest) for s in similarity]
        if method == "sparse":
            sigma = 1 / len(patches) if threshold is None else threshold
            scores = [score if score >= sigma else 0.0 for score in scores]
    return [score / sum(scores) for score in scores]


def caption_loss(grouped: Sequence[Vector], tokens: Sequence[Vector], logit_scale: float) -> list[float]:
    """Eq. 6 before any mean: one term for each token of one caption."""

    def log_sum_exp(logits: list[float]) -> float:
        highest = max(logits)
        return highest + math.log(math.fsum(math.exp(logit - highest) for logit in logits))

    terms = []
    for j in range(len(tokens)):
        match = logit_scale * cosine(grouped[j], tokens[j])
        over_tokens = [logit_scale * cosine(grouped[j], token) for token in tokens]
        over_groups = [logit_scale * cosine(group, tokens[j]) for group in grouped]
        terms.append(((log_sum_exp(over_tokens) - match) + (log_sum_exp(over_groups) - match)) / 2)
    return terms


@dataclass
class Reference:
    alignment: np.ndarray  # [B, L, P]
    loss: float


def fine_grained(
    patch_features: np.ndarray,
    token_features: np.ndarray,
    token_mask: np.ndarray,
    logit_scale: float,
    threshold: float | None = None,
    alignment: str = "sparse",
    reduction: str = "token",
    patch_mask: np.ndarray | None = None,
    region_mask: np.ndarray | None = None,
) -> Reference:
    """Eqs. 2 to 6, and the alignment of every token, masked ones too."""
    (batch, length, dim), patches = token_features.shape, patch_features.shape[1]
    weights = np.zeros((batch, length, patches))
    captions: list[list[float]] = []
    for b in range(batch):
        grouped, tokens = [], []
        for j in range(length):
            usable = [
                p
                for p in range(patches)
                if (patch_mask is None or patch_mask[b, p]) and (region_mask is None or region_mask[b, j, p])
            ]
            if not usable:
                continue
            token = token_features[b, j].tolist()
            own = [patch_features[b, p].tolist() for p in usable]
            weights[b, j, usable] = token_weights(token, own, threshold, alignment)
            if token_mask[b, j]:
                tokens.append(token)
                grouped.append([dot(weights[b, j, usable], [patch[d] for patch in own]) for d in range(dim)])
        captions.append(caption_loss(grouped, tokens, logit_scale))

    if reduction == "token":
        terms = [term for caption in captions for term in caption]
        return Reference(weights, sum(terms) / max(len(terms), 1))
    return Reference(weights, sum(sum(caption) / max(len(caption), 1) for caption in captions) / batch)


def image_scores(
    patch_features: np.ndarray,
    token_features: np.ndarray,
    token_mask: np.ndarray,
    threshold: float | None = None,
    alignment: str = "sparse",
    patch_mask: np.ndarray | None = None,
    region_mask: np.ndarray | None = None,
) -> list[list[float | None]]:
    """The score of every caption (row) on every image (column): None where there is nothing to score."""
    batch, length, dim = token_features.shape

    def patches_of(i: int, k: int, j: int) -> list[Vector]:
        """Those of image k that token j of caption i may use: regions lie in the own image."""
        return [
            patch.tolist()
            for p, patch in enumerate(patch_features[k])
            if (patch_mask is None or patch_mask[k, p]) and (i != k or region_mask is None or region_mask[i, j, p])
        ]

    def score(i: int, k: int) -> float | None:
        cosines = []
        for j in range(length):
            if not token_mask[i, j] or not patches_of(i, i, j):
                continue
            token, patches = token_features[i, j].tolist(), patches_of(i, k, j)
            if not patches:
                return None
            weights = token_weights(token, patches, threshold, alignment)
            cosines.append(cosine(token, [dot(weights, [patch[d] for patch in patches]) for d in range(dim)]))
        return math.fsum(cosines) / len(cosines) if cosines else None

    return [[score(i, k) for k in range(batch)] for i in range(batch)]


def image_contrastive(
    patch_features: np.ndarray,
    token_features: np.ndarray,
    token_mask: np.ndarray,
    logit_scale: float,
    image_negatives: int,
    reduction: str = "token",
    direction: str = "text_to_image",
    **options: object,
) -> float:
    """Cross-entropy of every caption over the scores of its image and of the next ones; and of every image over those
    of its caption and of the ones before.
    """
    scores = image_scores(patch_features, token_features, token_mask, **options)
    batch, terms = len(scores), []
    for i in range(batch):
        own = scores[i][i]
        if own is None:
            continue
        contrasted = [[scores[i][(i + k) % batch] for k in range(1 + image_negatives)]]
        if direction == "both":
            contrasted.append([scores[(i - k) % batch][i] for k in range(1 + image_negatives)])
        entropies = [
            math.log(math.fsum(math.exp(logit_scale * (s - own)) for s in ones if s is not None))
            for ones in contrasted
        ]
        terms.append(math.fsum(entropies) / len(entropies))
    return math.fsum(terms) / (max(len(terms), 1) if reduction == "token" else batch)


# Cosines that are no further apart tie.
TIE = 1e-6


def alignment_diagnostics(
    weights: np.ndarray, patch_features: np.ndarray, token_features: np.ndarray, counts: np.ndarray, usable: np.ndarray
) -> dict[str, tuple[float, float]]:
    """Each metric as the (lowest, highest) value it may have: rounding decides whether two cosines just tie.

    A tie is a miss.

    Args:
        weights: [B, L, P], of Eq. 4.
        patch_features: [B, P, D].
        token_features: [B, L, D].
        counts: bool [B, L], the tokens that count.
        usable: bool [B, L, P], the patches that each token may use.
    """
    surely, possibly, kept, entropies = [], [], [], []
    for b in range(len(weights)):
        members = [j for j in range(counts.shape[1]) if counts[b, j]]
        tokens = {j: token_features[b, j].tolist() for j in members}
        groups = {j: [dot(weights[b, j].tolist(), values.tolist()) for values in patch_features[b].T] for j in members}
        for j in members:
            own = cosine(groups[j], tokens[j])
            for others in (
                [cosine(groups[j], tokens[k]) for k in members if k != j],
                [cosine(groups[k], tokens[j]) for k in members if k != j],
            ):
                nearest = max(others, default=-2.0)
                surely.append(own > nearest + TIE + 1e-9)
                possibly.append(own > nearest + TIE - 1e-9)
            shares = [float(weights[b, j, p]) for p in range(weights.shape[2]) if usable[b, j, p]]
            kept.append(sum(share > 0 for share in shares) / len(shares))
            entropy = -math.fsum(share * math.log(share) for share in shares if share > 0)
            entropies.append(entropy / math.log(len(shares)) if len(shares) > 1 else 0.0)

    def mean(values: list) -> float:
        return math.fsum(values) / max(len(values), 1)

    return {
        "fine_grained_accuracy": (mean(surely), mean(possibly)),
        "patches_kept": (mean(kept), mean(kept)),
        "alignment_entropy": (mean(entropies), mean(entropies)),
    }
