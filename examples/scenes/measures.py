"""What a model has learnt of held-out scenes, in figures between 0 and 1, each with its chance and its ceiling."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sparc_loss.embeddings.words import word_positions
from sparc_loss.evaluation import (
    BACKGROUND,
    HARD_NEGATIVE_CHANCE,
    ImageDependence,
    PointingGame,
    box_masks,
    hard_negative_accuracy,
    image_dependence,
    intersection_and_union,
    k_precision,
    majority_segmentation,
    mean_image_dependence,
    mean_iou,
    nearest_captions,
    pointing_game,
    random_intersection_and_union,
    recall_at_k,
    recall_chance,
    segment,
)
from sparc_loss.evaluation.encoder import Encoder
from sparc_loss.evaluation.markdown import markdown_table
from sparc_loss.functional import token_patch_similarity

from .dataset import Annotations
from .evaluation_csv import swapped_captions
from .scene import IMAGE_SIZE, SceneObject

SIZE = (IMAGE_SIZE, IMAGE_SIZE)
MEASURES = {
    "image_to_text_recall": "retrieval R@1, image to text",
    "text_to_image_recall": "retrieval R@1, text to image",
    "hard_negatives": "two words exchanged: the true caption is nearer",
    "k_precision": "K-Precision, nouns and adjectives",
    "colour_word_pointing": "pointing, colour words",
    "kind_word_pointing": "pointing, kind words",
    "new_pair_pointing": "pointing, kind words of pairs never seen together",
    "phrase_pointing": "pointing, phrases",
    "phrase_tokens_pointing": "pointing, phrases as mean of their tokens",
    "mean_iou": "segmentation mIoU with background",
    "right_images": "a token finds its group, right images",
    "shuffled_images": "a token finds its group, shuffled images",
    "constant_images": "a token finds its group, constant image",
    "right_images_loss": "fine-grained loss, right images",
    "shuffled_images_loss": "fine-grained loss, shuffled images",
    "constant_images_loss": "fine-grained loss, constant image",
}
# 1/temperature of the fine-grained loss where it is measured: one for all, whatever each was trained with.
PROBE_SCALE = 10.0
# The threshold between background and objects is chosen among these.
THRESHOLDS = tuple(torch.linspace(-0.5, 0.9, 29).tolist())
_BATCH = 100


class Level(NamedTuple):
    """What guessing scores, and the best that patches of this size allow: of a loss the lowest, 0."""

    chance: float
    ceiling: float


@dataclass(frozen=True)
class Embeddings:
    """A split as a model embeds it: N scenes of P patches and L tokens, and the C phrases that occur in it."""

    image_features: Tensor  # [N, D], normalised
    text_features: Tensor  # [N, D], normalised
    patch_features: Tensor  # [N, P, D]
    token_features: Tensor  # [N, L, D]
    token_mask: Tensor  # [N, L]
    words: list[list[list[int]]]  # the positions of the tokens of each word of each caption
    swapped: dict[int, Tensor]  # scene -> its caption with two words exchanged, [D]
    phrase_features: Tensor  # [C, D], normalised, in the order of `phrases`
    phrase_token_features: Tensor  # [C, D], the sum of the phrase's token embeddings
    phrases: list[str]
    grid: tuple[int, int]


def read_images(scenes: Annotations, preprocess: Any) -> Tensor:
    """The split's images [N, 3, H, W], as the model takes them."""
    pixels = []
    for path in scenes.images:
        with Image.open(path) as image:
            pixels.append(preprocess(image))
    return torch.stack(pixels)


@torch.no_grad()
def embed(model: nn.Module, tokenizer: Any, images: Tensor, scenes: Annotations) -> Embeddings:
    """Embed a split with a surfaced model, which is set to eval mode."""
    encoder = Encoder(model.eval(), tokenizer, _BATCH, next(model.parameters()).device)
    phrases = sorted({each.phrase for objects in scenes.objects for each in objects})
    swapped = swapped_captions(scenes)
    batches = images.split(_BATCH)
    patches, grids = zip(*map(encoder.patches, batches), strict=True)
    return Embeddings(
        torch.cat([encoder.pooled(batch) for batch in batches]),
        encoder.texts(scenes.captions),
        torch.cat(patches),
        *encoder.tokens(scenes.captions),
        [word_positions(tokenizer, caption) for caption in scenes.captions],
        dict(zip(swapped, encoder.texts(list(swapped.values())), strict=True)),
        encoder.texts(phrases),
        encoder.token_sums(phrases),
        phrases,
        grids[0],
    )


def measure(embeddings: Embeddings, scenes: Annotations, background_threshold: float) -> dict[str, float]:
    """The measures of a split by the names of MEASURES: in [0, 1], but for the losses, which are only at least 0.

    Pointing by colours, and by pairs never seen together, is of worlds that have them.
    """
    recall = recall_at_k(embeddings.image_features, embeddings.text_features)
    nearest = nearest_captions(embeddings.image_features, embeddings.text_features)
    swapped = list(embeddings.swapped)
    dependence = _image_dependence(embeddings)
    games = _pointing_games(embeddings, scenes)
    return {
        "image_to_text_recall": recall.image_to_text,
        "text_to_image_recall": recall.text_to_image,
        "hard_negatives": hard_negative_accuracy(
            embeddings.image_features[swapped],
            embeddings.text_features[swapped],
            torch.stack(list(embeddings.swapped.values())),
        ),
        "k_precision": k_precision(scenes.captions, nearest, counts=_nouns_and_adjectives(scenes))
        .precision.nanmean()
        .item(),
        **{name: _mean(game.hits) for name, game in games.items()},
        "mean_iou": _mean_iou_by_threshold(embeddings, scenes, [background_threshold])[0],
        **{f"{images}_images": getattr(dependence, images).token_accuracy for images in _IMAGES},
        **{f"{images}_images_loss": getattr(dependence, images).loss for images in _IMAGES},
    }


def levels(embeddings: Embeddings, scenes: Annotations) -> dict[str, Level]:
    """Chance and ceiling of each measure on a split; they depend on the scenes and the grid, not on the model.

    Chance is any caption, any patch, any label of the scene or background for every pixel, and for a loss groups that
    are all alike: the logarithm of the number of a caption's tokens. A pointing game cannot hit an object that lies
    between the centres of patches, nor a label per patch follow its outline.
    """
    names = list(embeddings.phrases)
    guessed, best = 0, 0
    for labels, objects in zip(scenes.labels, scenes.objects, strict=True):
        present, target = _phrase_target(names, labels, objects)
        guess = random_intersection_and_union(target, len(names), present, background=True)
        majority = majority_segmentation(target, embeddings.grid, len(names), background=True)
        guessed = guessed + torch.stack(guess)
        best = best + torch.stack(intersection_and_union(majority, target, len(names)))
    any_caption = torch.zeros(len(scenes.captions), dtype=torch.long)
    precision = k_precision(scenes.captions, any_caption, counts=_nouns_and_adjectives(scenes)).chance.nanmean().item()
    by_chance = _image_dependence(embeddings).chance
    tokens = embeddings.token_mask.sum(dim=1)
    tied_loss = ((tokens * tokens.clamp(min=1).log()).sum() / tokens.sum()).item()
    recall = recall_chance(len(scenes.captions))
    games = _pointing_games(embeddings, scenes)
    return {
        "image_to_text_recall": Level(recall, 1.0),
        "text_to_image_recall": Level(recall, 1.0),
        "hard_negatives": Level(HARD_NEGATIVE_CHANCE, 1.0),
        "k_precision": Level(precision, 1.0),
        **{name: Level(_mean(game.chance), _mean(game.reachable)) for name, game in games.items()},
        "mean_iou": Level(mean_iou(*guessed, background=True), mean_iou(*best, background=True)),
        **{f"{images}_images": Level(by_chance, 1.0) for images in _IMAGES},
        **{f"{images}_images_loss": Level(tied_loss, 0.0) for images in _IMAGES},
    }


def best_background_threshold(embeddings: Embeddings, scenes: Annotations) -> float:
    """The background threshold with the highest mIoU on a split: the validation split, never the one reported."""
    return THRESHOLDS[int(np.argmax(_mean_iou_by_threshold(embeddings, scenes, THRESHOLDS)))]


def measures_table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """One row per measure, one column per model."""
    rows = [["measure", *columns]]
    for name, title in MEASURES.items():
        if all(name in column for column in columns.values()):
            rows.append([title, *(f"{column[name]:.3f}" for column in columns.values())])
    return markdown_table(rows)


_IMAGES = ("right", "shuffled", "constant")


def _nouns_and_adjectives(scenes: Annotations) -> set[str]:
    """The words that tell something of an object, of all captions."""
    return {
        caption.split()[word].strip(",")
        for caption, objects in zip(scenes.captions, scenes.objects, strict=True)
        for each in objects
        for word in each.words.values()
    }


def _image_dependence(embeddings: Embeddings) -> ImageDependence:
    """With the paper's alignment."""
    parts = (embeddings.patch_features, embeddings.token_features, embeddings.token_mask)
    batches = zip(*(part.split(_BATCH) for part in parts), strict=True)
    return mean_image_dependence([image_dependence(*batch, logit_scale=PROBE_SCALE) for batch in batches])


def _pointing_games(embeddings: Embeddings, scenes: Annotations) -> dict[str, PointingGame]:
    words = {
        "colour_word_pointing": _said(scenes, "colour"),
        "kind_word_pointing": _said(scenes, "kind"),
        "new_pair_pointing": [(index, each, word) for index, each, word in _said(scenes, "kind") if each.new_pair],
    }
    return {
        **{name: _word_pointing(embeddings, said) for name, said in words.items() if said},
        "phrase_pointing": _phrase_pointing(embeddings, scenes, embeddings.phrase_features),
        "phrase_tokens_pointing": _phrase_pointing(embeddings, scenes, embeddings.phrase_token_features),
    }


def _said(scenes: Annotations, says: str) -> list[tuple[int, SceneObject, int]]:
    """Scene, object and word, wherever a caption says this of an object."""
    return [
        (index, each, each.words[says])
        for index, objects in enumerate(scenes.objects)
        for each in objects
        if says in each.words
    ]


def _word_pointing(embeddings: Embeddings, said: Sequence[tuple[int, SceneObject, int]]) -> PointingGame:
    """Words of the captions by their own token embeddings, with the loss's similarity (Eq. 2)."""
    similarity = token_patch_similarity(embeddings.token_features, embeddings.patch_features)
    named = [(index, embeddings.words[index][word], each) for index, each, word in said]
    # A word's tokens lie in their mean; what the context has cut off, no model could point at.
    maps = torch.stack([similarity[index, positions].mean(dim=0) for index, positions, _ in named if positions])
    return pointing_game(maps, embeddings.grid, _masks([each for _, positions, each in named if positions]))


def _phrase_pointing(embeddings: Embeddings, scenes: Annotations, phrase_features: Tensor) -> PointingGame:
    """Phrases by cosine with the patches."""
    patch_features = torch.nn.functional.normalize(embeddings.patch_features, dim=-1)
    named = [(index, each) for index, objects in enumerate(scenes.objects) for each in objects]
    phrase_features = phrase_features[[embeddings.phrases.index(each.phrase) for _, each in named]]
    maps = (patch_features[[index for index, _ in named]] @ phrase_features.unsqueeze(-1)).squeeze(-1)
    return pointing_game(maps, embeddings.grid, _masks([each for _, each in named]))


def _masks(objects: Sequence[SceneObject]) -> Tensor:
    """Where each may be found: in any of its boxes, bool [N, 64, 64]."""
    return torch.stack([box_masks(torch.tensor(each.boxes), *SIZE).any(dim=0) for each in objects])


def _mean_iou_by_threshold(embeddings: Embeddings, scenes: Annotations, thresholds: Sequence[float]) -> list[float]:
    totals = [0] * len(thresholds)
    count = len(embeddings.phrases)
    for patches, labels, objects in zip(embeddings.patch_features, scenes.labels, scenes.objects, strict=True):
        present, target = _phrase_target(embeddings.phrases, labels, objects)
        segmented = segment(patches, embeddings.phrase_features, embeddings.grid, SIZE, present=present)
        for index, threshold in enumerate(thresholds):
            predicted = segmented.labels.masked_fill(segmented.scores < threshold, BACKGROUND)
            totals[index] = totals[index] + torch.stack(intersection_and_union(predicted, target, count))
    return [mean_iou(*total, background=True) for total in totals]


def _phrase_target(phrases: list[str], labels: np.ndarray, objects: Sequence[SceneObject]) -> tuple[list[int], Tensor]:
    """The phrases of a scene, and its label map with each object's number replaced by that of its phrase."""
    present = [phrases.index(each.phrase) for each in objects]
    return present, torch.tensor([BACKGROUND, *present])[torch.from_numpy(labels.astype(np.int64))]


def _mean(values: Tensor) -> float:
    return values.float().mean().item()
