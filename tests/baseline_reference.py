"""The baselines once more, slowly: loops, one image, caption, patch and token at a time.

Written from the papers' formulas, sharing no line with the library; the library is held against it. Numbers are
torch's only so that autograd gives the gradient. What a mask leaves out is never looked at.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Pair:
    patches: list[Tensor]  # those that count, each [D]
    tokens: list[Tensor]  # those that count, each [D]
    text: Tensor  # the global text embedding [D]
    image: Tensor  # the global image embedding [D]


def pairs_of(outputs: dict[str, Tensor]) -> list[Pair]:
    """The pairs of a batch, which may have no token or no patch."""
    pairs = []
    for b in range(len(outputs["token_mask"])):
        patches, tokens = outputs["patch_features"][b], outputs["token_features"][b]
        patch_mask = outputs.get("patch_mask")
        pairs.append(
            Pair(
                [patches[p] for p in range(len(patches)) if patch_mask is None or patch_mask[b, p]],
                [tokens[j] for j in range(len(tokens)) if outputs["token_mask"][b, j]],
                outputs["text_features"][b],
                outputs["image_features"][b],
            )
        )
    return pairs


def dot(left: Tensor, right: Tensor) -> Tensor:
    return sum(left[d] * right[d] for d in range(len(left)))


def cosine(left: Tensor, right: Tensor) -> Tensor:
    if not left.any() or not right.any():
        return left.new_zeros(())
    return dot(left, right) / (dot(left, left).sqrt() * dot(right, right).sqrt())


def mean(values: list[Tensor]) -> Tensor:
    return sum(values) / len(values)


def weighted_sum(weights: list[Tensor], vectors: list[Tensor]) -> Tensor:
    return sum(weight * vector for weight, vector in zip(weights, vectors, strict=True))


def softmax(logits: list[Tensor]) -> list[Tensor]:
    highest = max(logit.item() for logit in logits)
    exponentials = [(logit - highest).exp() for logit in logits]
    return [each / sum(exponentials) for each in exponentials]


def log_sum_exp(logits: list[Tensor]) -> Tensor:
    highest = max(logit.item() for logit in logits)
    return highest + sum((logit - highest).exp() for logit in logits).log()


def cross_entropy(logits: list[Tensor], target: int) -> Tensor:
    return log_sum_exp(logits) - logits[target]


def info_nce(
    pairs: list[Pair],
    logit_scale: float,
    image_to_text: Callable[[Pair, Pair], Tensor],
    text_to_image: Callable[[Pair, Pair], Tensor],
) -> Tensor:
    """Mean of both directions; each function takes (image's pair, caption's pair)."""
    if not pairs:
        return torch.zeros((), dtype=torch.float64)
    losses = []
    for i, own in enumerate(pairs):
        losses.append(cross_entropy([logit_scale * image_to_text(own, other) for other in pairs], i) / 2)
        losses.append(cross_entropy([logit_scale * text_to_image(other, own) for other in pairs], i) / 2)
    return sum(losses) / len(pairs)


def filip(outputs: dict[str, Tensor]) -> Tensor:
    def image_to_text(image: Pair, caption: Pair) -> Tensor:
        return mean([max(cosine(patch, token) for token in caption.tokens) for patch in image.patches])

    def text_to_image(image: Pair, caption: Pair) -> Tensor:
        return mean([max(cosine(patch, token) for patch in image.patches) for token in caption.tokens])

    pairs = [pair for pair in pairs_of(outputs) if pair.patches and pair.tokens]
    return info_nce(pairs, outputs["logit_scale"], image_to_text, text_to_image)


def pacl(outputs: dict[str, Tensor], weighting: str = "cosine") -> Tensor:
    def compatibility(image: Pair, caption: Pair) -> Tensor:
        cosines = [cosine(patch, caption.text) for patch in image.patches]
        weights = {
            "cosine": lambda: cosines,
            "sigmoid": lambda: [1 / (1 + (-each).exp()) for each in cosines],
            "softmax": lambda: softmax(cosines),
        }[weighting]()
        return cosine(weighted_sum(weights, image.patches), caption.text)

    pairs = [pair for pair in pairs_of(outputs) if pair.patches]
    return info_nce(pairs, outputs["logit_scale"], compatibility, compatibility)


def gloria(outputs: dict[str, Tensor], matching_scale: float = 5.0) -> Tensor:
    def match(image: Pair, caption: Pair) -> Tensor:
        exponents = []
        for token in caption.tokens:
            weights = softmax([dot(token, patch) / math.sqrt(len(token)) for patch in image.patches])
            exponents.append(matching_scale * cosine(weighted_sum(weights, image.patches), token))
        return log_sum_exp(exponents) / matching_scale

    pairs = [pair for pair in pairs_of(outputs) if pair.patches and pair.tokens]
    return info_nce(pairs, outputs["logit_scale"], match, match)


def flair(outputs: dict[str, Tensor], weights: dict[str, Tensor], heads: int) -> Tensor:
    """`weights` are those of FlairHeads by their names; the layer norms are as they are at first."""
    scale, pairs = outputs["logit_scale"], pairs_of(outputs)

    def linear(vector: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
        return torch.stack([dot(row, vector) for row in matrix]) + bias

    size = len(pairs[0].text)
    matrices, biases = weights["attn.in_proj_weight"], weights["attn.in_proj_bias"]
    query, key, value = ((matrices[k * size : (k + 1) * size], biases[k * size : (k + 1) * size]) for k in range(3))

    def pooled(image: Pair, caption: Pair) -> Tensor:
        own = linear(layer_norm(caption.text), *query)
        keys = [linear(layer_norm(patch), *key) for patch in image.patches]
        values = [linear(layer_norm(patch), *value) for patch in image.patches]
        outputs = []
        for head in range(heads):
            part = slice(head * size // heads, (head + 1) * size // heads)
            logits = [dot(own[part], each[part]) / math.sqrt(size // heads) for each in keys]
            *shares, _ = softmax([*logits, torch.zeros((), dtype=torch.float64)])
            outputs.append(weighted_sum(shares, [each[part] for each in values]))
        return linear(torch.cat(outputs), weights["attn.out_proj.weight"], weights["attn.out_proj.bias"])

    total = torch.zeros((), dtype=torch.float64)
    for i, image in enumerate(pairs):
        for j, caption in enumerate(pairs if image.patches else []):
            logit = scale * cosine(pooled(image, caption), caption.text) + weights["bias"]
            total = total + (1 + (-logit if i == j else logit).exp()).log()
    return total / len(pairs)


def layer_norm(vector: Tensor) -> Tensor:
    average = sum(vector) / len(vector)
    variance = sum((each - average) ** 2 for each in vector) / len(vector)
    return (vector - average) / (variance + 1e-5).sqrt()


def attended(query: Tensor, context: list[Tensor], attention: dict[str, Tensor]) -> Tensor:
    """One query's output of a cross-attention with the matrices "query", "key", "value" and "output"."""

    def times(matrix: Tensor, vector: Tensor) -> Tensor:
        return torch.stack([dot(row, vector) for row in matrix])

    own = times(attention["query"], layer_norm(query))
    keys = [times(attention["key"], layer_norm(each)) for each in context]
    values = [times(attention["value"], layer_norm(each)) for each in context]
    weights = softmax([dot(own, key) / math.sqrt(len(own)) for key in keys])
    return times(attention["output"], weighted_sum(weights, values))


def within_pair(counterparts: list[Tensor], vectors: list[Tensor], logit_scale: Tensor) -> Tensor:
    """Symmetric contrast of each vector with its counterpart, mean over vectors."""
    losses = []
    for j in range(len(vectors)):
        over_vectors = [logit_scale * cosine(counterparts[j], vector) for vector in vectors]
        over_counterparts = [logit_scale * cosine(counterpart, vectors[j]) for counterpart in counterparts]
        losses.append((cross_entropy(over_vectors, j) + cross_entropy(over_counterparts, j)) / 2)
    return mean(losses)


def mgca_tokens(outputs: dict[str, Tensor], to_patches: dict[str, Tensor], to_tokens: dict[str, Tensor]) -> Tensor:
    """Token alignment; `to_patches` are the matrices of the tokens' attention to patches."""
    pairs, scale = pairs_of(outputs), outputs["logit_scale"]
    total = torch.zeros((), dtype=torch.float64)
    for pair in pairs:
        if pair.patches and pair.tokens:
            patch_side = [attended(token, pair.patches, to_patches) for token in pair.tokens]
            token_side = [attended(patch, pair.tokens, to_tokens) for patch in pair.patches]
            total = total + within_pair(patch_side, pair.tokens, scale) / 2
            total = total + within_pair(token_side, pair.patches, scale) / 2
    return total / len(pairs)


def assignments(logits: list[list[float]], epsilon: float = 0.05, steps: int = 3) -> list[list[float]]:
    """Sinkhorn in Python's own floats: prototypes get a total of 1/K, then samples a total of 1/B; rows sum to 1."""
    mass = [[math.exp(logit / epsilon) for logit in row] for row in logits]
    samples, prototypes = len(mass), len(mass[0])
    for _ in range(steps):
        totals = [sum(row[k] for row in mass) for k in range(prototypes)]
        mass = [[row[k] / totals[k] / prototypes for k in range(prototypes)] for row in mass]
        mass = [[each / sum(row) / samples for each in row] for row in mass]
    return [[each * samples for each in row] for row in mass]


def mgca_prototypes(outputs: dict[str, Tensor], prototypes: Tensor, prototype_scale: float = 5.0) -> Tensor:
    """Prototype alignment of a whole batch."""
    sides = [
        [
            [dot(feature, prototype) / dot(prototype, prototype).sqrt() for prototype in prototypes]
            for feature in features
        ]
        for features in (outputs["image_features"], outputs["text_features"])
    ]
    losses = []
    for assigned, predicting in (sides, sides[::-1]):
        codes = assignments([[each.item() for each in row] for row in assigned])
        for code, row in zip(codes, predicting, strict=True):
            logits = [prototype_scale * each for each in row]
            losses.append(sum(share * cross_entropy(logits, k) for k, share in enumerate(code)))
    return mean(losses)
