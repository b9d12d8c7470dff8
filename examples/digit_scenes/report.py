"""What the models of a run have learnt of the held-out scenes: a table, and what words select, as picture and page."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor

from sparc_loss import surface_embeddings
from sparc_loss.evaluation import (
    BACKGROUND,
    PointingGame,
    box_masks,
    intersection_and_union,
    mean_iou,
    pointing_game,
    random_intersection_and_union,
    recall_at_k,
    recall_chance,
    segment,
)
from sparc_loss.functional import token_patch_similarity
from sparc_loss.show import align, alignment_page, draw

from .dataset import Annotations, read_annotations
from .scenes import IMAGE_SIZE, SceneObject

SIZE = (IMAGE_SIZE, IMAGE_SIZE)
MEASURES = {
    "image_to_text_recall": "retrieval R@1, image to text",
    "text_to_image_recall": "retrieval R@1, text to image",
    "colour_word_pointing": "pointing, colour words",
    "kind_word_pointing": "pointing, kind words",
    "phrase_pointing": "pointing, phrases",
    "mean_iou": "segmentation mIoU",
}


@dataclass(frozen=True)
class Embeddings:
    """A split as a model embeds it: N scenes of P patches and L tokens, and the C phrases that occur in it."""

    image_features: Tensor  # [N, D], normalised
    text_features: Tensor  # [N, D], normalised
    patch_features: Tensor  # [N, P, D]
    token_features: Tensor  # [N, L, D]
    phrase_features: Tensor  # [C, D], normalised, in the order of `phrases`
    phrases: list[str]
    grid: tuple[int, int]


@torch.no_grad()
def embed(model_folder: Path, scenes: Annotations) -> Embeddings:
    """Embed a split with the model of a local-dir folder."""
    name = f"local-dir:{model_folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    surface_embeddings(model, tokenizer).eval()
    images = torch.stack([preprocess(Image.open(path)) for path in scenes.images])
    texts = tokenizer(scenes.captions)
    phrases = sorted({each.phrase for objects in scenes.objects for each in objects})
    patch_features, grid = model.encode_patches(images)
    token_features, _ = model.encode_tokens(texts)
    return Embeddings(
        model.encode_image(images, normalize=True),
        model.encode_text(texts, normalize=True),
        patch_features,
        token_features,
        model.encode_text(tokenizer(phrases), normalize=True),
        phrases,
        grid,
    )


def measure(embeddings: Embeddings, scenes: Annotations, background_threshold: float) -> dict[str, float]:
    """All measures of a split, each in [0, 1], by the names of MEASURES."""
    recall = recall_at_k(embeddings.image_features, embeddings.text_features)
    return {
        "image_to_text_recall": recall.image_to_text,
        "text_to_image_recall": recall.text_to_image,
        "colour_word_pointing": _mean(_word_pointing(embeddings, scenes, "colour").hits),
        "kind_word_pointing": _mean(_word_pointing(embeddings, scenes, "kind").hits),
        "phrase_pointing": _mean(_phrase_pointing(embeddings, scenes).hits),
        "mean_iou": _mean_iou_by_threshold(embeddings, scenes, [background_threshold])[0],
    }


def chance(embeddings: Embeddings, scenes: Annotations) -> dict[str, float]:
    """What guessing scores: any caption, any patch, any label of the scene or background for every pixel."""
    totals = 0
    for labels, objects in zip(scenes.labels, scenes.objects, strict=True):
        present, target = _phrase_target(embeddings.phrases, labels, objects)
        guessed = random_intersection_and_union(target, len(embeddings.phrases), present, background=True)
        totals = totals + torch.stack(guessed)
    return {
        "image_to_text_recall": recall_chance(len(scenes.captions)),
        "text_to_image_recall": recall_chance(len(scenes.captions)),
        "colour_word_pointing": _mean(_word_pointing(embeddings, scenes, "colour").chance),
        "kind_word_pointing": _mean(_word_pointing(embeddings, scenes, "kind").chance),
        "phrase_pointing": _mean(_phrase_pointing(embeddings, scenes).chance),
        "mean_iou": mean_iou(*totals, background=True),
    }


def best_background_threshold(embeddings: Embeddings, scenes: Annotations) -> float:
    """The background threshold with the highest mIoU on a split: the validation split, never the one reported."""
    thresholds = torch.linspace(-0.5, 0.9, 29).tolist()
    ious = _mean_iou_by_threshold(embeddings, scenes, thresholds)
    return thresholds[int(np.argmax(ious))]


def write_report(run: Path, models: Mapping[str, Path], data: Path) -> str:
    """Measure the models on the test split; write results.json, table.md, words.png and words.html into `run`.

    Args:
        run: where to write.
        models: column of the table -> local-dir folder.
        data: what `write_dataset` wrote.

    Returns:
        The table, in Markdown.
    """
    val, test = read_annotations(data, "val"), read_annotations(data, "test")
    columns, embedded = {}, {}
    for column, folder in models.items():
        threshold = best_background_threshold(embed(folder, val), val)
        embedded[column] = embed(folder, test)
        columns[column] = measure(embedded[column], test, threshold)
    columns["chance"] = chance(embedded[column], test)
    (run / "results.json").write_text(json.dumps(columns, indent=2))
    table = _table(columns)
    (run / "table.md").write_text(table)
    show_words(run, {name: models[name] for name in ("CLIP", "SPARC")}, test)
    return table


def show_words(run: Path, models: Mapping[str, Path], scenes: Annotations) -> None:
    """words.png: two scenes, the words that tell colour, kind or size of an object; words.html: six, all words."""
    loaded = {}
    for name, folder in models.items():
        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        loaded[name] = model, preprocess, open_clip.get_tokenizer(f"local-dir:{folder}")
    chosen = first_scenes(scenes)
    pairs = [
        align(scenes.images[index], scenes.captions[index], *parts, title=name)
        for index in chosen
        for name, parts in loaded.items()
    ]
    said = {
        scenes.captions[index].split()[word].strip(",")
        for index in chosen
        for each in scenes.objects[index]
        for word in each.words.values()
    }
    drawn = 2 * len(models)
    draw(pairs[:drawn], words=said).savefig(run / "words.png", dpi=80)
    (run / "words.html").write_text(alignment_page(pairs), encoding="utf-8")


def first_scenes(scenes: Annotations, number: int = 6, objects: int = 3) -> list[int]:
    """The first scenes of so many objects: a rule, so that no picture is picked for its beauty."""
    return [index for index, each in enumerate(scenes.objects) if len(each) == objects][:number]


def _word_pointing(embeddings: Embeddings, scenes: Annotations, says: str) -> PointingGame:
    """Words of the captions by their own token embedding, with the loss's similarity (Eq. 2)."""
    similarity = token_patch_similarity(embeddings.token_features, embeddings.patch_features)
    named = [
        (index, each.words[says], each.box)
        for index, objects in enumerate(scenes.objects)
        for each in objects
        if says in each.words
    ]
    maps = torch.stack([similarity[index, word] for index, word, _ in named])
    return pointing_game(maps, embeddings.grid, box_masks(torch.tensor([box for *_, box in named]), *SIZE))


def _phrase_pointing(embeddings: Embeddings, scenes: Annotations) -> PointingGame:
    """Phrases as the model embeds a text, by cosine with the patches."""
    patch_features = torch.nn.functional.normalize(embeddings.patch_features, dim=-1)
    named = [(index, each) for index, objects in enumerate(scenes.objects) for each in objects]
    phrase_features = embeddings.phrase_features[[embeddings.phrases.index(each.phrase) for _, each in named]]
    maps = (patch_features[[index for index, _ in named]] @ phrase_features.unsqueeze(-1)).squeeze(-1)
    return pointing_game(maps, embeddings.grid, box_masks(torch.tensor([each.box for _, each in named]), *SIZE))


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


def _table(columns: Mapping[str, Mapping[str, float]]) -> str:
    width = max(map(len, MEASURES.values()))
    rows = [["measure".ljust(width), *(name.rjust(6) for name in columns)], ["-" * width, *["-----:"] * len(columns)]]
    for name, title in MEASURES.items():
        rows.append([title.ljust(width), *(f"{column[name]:6.3f}" for column in columns.values())])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
