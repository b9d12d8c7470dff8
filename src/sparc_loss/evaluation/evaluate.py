"""All measures that a data set allows, for one model. Importing this imports open_clip.

Pooled features are computed with the model's own preprocessing, which may crop the borders. Patches are computed on
the whole image, squashed to the model's size, so that boxes and masks match the grid of patches.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparc_loss.embeddings.reading_names import Reading
from sparc_loss.embeddings.vision import patch_extent
from sparc_loss.embeddings.words import word_positions
from sparc_loss.evaluation.classification import top_k_accuracy
from sparc_loss.evaluation.dataset import IGNORED, DataError, EvaluationData, read_mask
from sparc_loss.evaluation.encoder import Encoder
from sparc_loss.evaluation.faithfulness import k_precision
from sparc_loss.evaluation.hard_negatives import HARD_NEGATIVE_CHANCE, hard_negative_accuracy
from sparc_loss.evaluation.image_batches import image_batches, worker_errors
from sparc_loss.evaluation.image_dependence import ImageDependence, image_dependence, mean_image_dependence
from sparc_loss.evaluation.pointing import box_masks, pointing_game
from sparc_loss.evaluation.retrieval import nearest_captions, recall_at_k, recall_chance
from sparc_loss.evaluation.segmentation import (
    BACKGROUND,
    intersection_and_union,
    majority_segmentation,
    mean_iou,
    random_intersection_and_union,
    segment,
)
from sparc_loss.functional import Alignment, token_patch_similarity

# Those of pooled features, then those of patches.
_OF_CAPTIONS = ("retrieval", "faithfulness", "hard_negatives")
_POOLED = (*_OF_CAPTIONS, "classification")
_DENSE = ("pointing", "segmentation", "image_dependence")
FAMILIES = (*_POOLED, *_DENSE)


class Measure(NamedTuple):
    """One figure, in [0, 1].

    Attributes:
        name: such as "image_to_text_R@1".
        value: the score of the model.
        chance: the score of guessing.
        ceiling: the best score that a grid of patches allows; 1 where the grid does not matter; None where it is not
            known, as with windows.
        count: number of images, captions, phrases, words or classes of which it is the mean.
    """

    name: str
    value: float
    chance: float
    ceiling: float | None
    count: int  # type: ignore[assignment]  # it hides tuple.count


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        families: of measures to take, of FAMILIES; those that the data do not allow are left out.
        reading: of the patches, see `sparc_loss.embeddings.readings`.
        templates: prompts for the names of classes, each with a "{}"; open_clip's averages them.
        background_threshold: cosine below which a pixel is background; None leaves that mIoU out.
        nouns_and_adjectives: the words for that form of K-Precision; None leaves it out.
        threshold: sigma of the fine-grained loss, for the probe of image dependence; None is 1/P.
        alignment: of the fine-grained loss, for the same probe.
        fine_grained_scale: 1/tau of the fine-grained loss, for the same probe; None is the model's logit_scale.
        batch_size: images at a time, and texts.
        workers: processes that read images; 0 is none beside this one.
        device: the model's.
        input_dtype: of the images.
        autocast: makes the context in which the model runs.
    """

    families: Collection[str] = FAMILIES
    reading: Reading = "last"
    templates: Sequence[str] = open_clip.OPENAI_IMAGENET_TEMPLATES
    background_threshold: float | None = None
    nouns_and_adjectives: Callable[[str], bool] | Collection[str] | None = None
    threshold: float | None = None
    alignment: Alignment = "sparse"
    fine_grained_scale: float | None = None
    batch_size: int = 64
    workers: int = 0
    device: torch.device | str = "cpu"
    input_dtype: torch.dtype = torch.float32
    autocast: Callable[[], AbstractContextManager] = nullcontext


@torch.inference_mode()
def evaluate(
    model: nn.Module, tokenizer: Any, data: EvaluationData, options: Options | None = None
) -> tuple[list[Measure], ImageDependence | None]:
    """Measure a model on a data set.

    Args:
        model: surfaced by `surface_embeddings`, with the `preprocess_cfg` that open_clip gives it; set to eval mode.
        tokenizer: the model's own.
        data: from `read_data`.
        options: None is the defaults.

    Returns:
        The measures that the data allow.
        The image dependence, over the first caption of each image; a last batch of one image is left out, and it is
        None where there is no other, or no caption.

    Raises:
        DataError: an image or mask that cannot be read, a box outside its image, a worker that ended or could not
            send what it read.
        ValueError: an unknown family of measures.
    """
    options = options or Options()
    settings = (options.batch_size, options.device, options.input_dtype, options.autocast)
    encoder = Encoder(model.eval(), tokenizer, *settings, progress=True)
    unknown = [family for family in options.families if family not in FAMILIES]
    if unknown:
        raise ValueError(f"families has {unknown[0]!r}; expected of {', '.join(FAMILIES)}")
    of_captions, pooled, patches_wanted = (
        any(family in options.families for family in group) for group in (_OF_CAPTIONS, _POOLED, _DENSE)
    )
    text_features = encoder.texts(data.captions, "captions") if of_captions and data.captions else None
    dense = _Dense(encoder, data, options)
    features: list[tuple[list[int], Tensor]] = []
    with worker_errors():
        for batch in image_batches(
            model, data.images, options.batch_size, options.workers, data.crops, own=pooled, whole=patches_wanted
        ):
            if batch.images is not None:
                features.append((batch.indices, encoder.pooled(batch.images)))
            if batch.whole is not None:
                patches, grid = encoder.patches(batch.whole, options.reading)
                height, width = batch.whole.shape[-2:]
                extent = patch_extent(model.visual, (height, width), grid)
                dense.add(batch.indices, patches, grid, extent, batch.sizes)
    measures = []
    if pooled:
        order = torch.tensor([index for indices, _ in features for index in indices])
        image_features = torch.cat([each for _, each in features])[order.argsort()]
        measures += _pooled_measures(image_features, text_features, dense.class_features, encoder, data, options)
    measures += [*dense.pointing(), *dense.segmentation()]
    return measures, mean_image_dependence(dense.dependence) if dense.dependence else None


class _Dense:
    """The measures that need patches, batch by batch, so that they are never all in memory."""

    def __init__(self, encoder: Encoder, data: EvaluationData, options: Options) -> None:
        self.encoder, self.data, self.options = encoder, data, options
        self.captions_of = data.captions_of()
        self.dependence: list[ImageDependence] = []
        scale = options.fine_grained_scale
        self.scale = encoder.model.logit_scale.exp().float().cpu() if scale is None else scale
        named = data.classes and ("classification" in options.families or "segmentation" in options.families)
        self.class_features = encoder.classes(data.classes, options.templates) if named else None
        self.families = options.families
        phrases = sorted(
            {each.phrase for objects in data.objects for each in objects} if "pointing" in self.families else ()
        )
        self.phrases = {phrase: index for index, phrase in enumerate(phrases)}
        if phrases:
            self.phrase_features = encoder.texts(phrases, "phrases")
            self.phrase_token_features = encoder.token_sums(phrases, "phrases, tokens")  # a mean but for the length
        # Numbers, because tensors would take a hundred times their memory.
        self.games: dict[str, list[tuple[float, float, float]]] = {"phrase": [], "phrase_tokens": [], "word": []}
        self.totals: dict[tuple[str, str], Tensor] = {}

    def add(
        self,
        batch: Sequence[int],
        patches: Tensor,
        grid: tuple[int, int],
        extent: tuple[float, float],
        sizes: Sequence[tuple[int, int]],
    ) -> None:
        """Take in the images `batch`, with their patches [B, P, D], what these cover, and sizes in pixels."""
        if self.data.captions and ("pointing" in self.families or "image_dependence" in self.families):
            self._add_captions(batch, patches, grid, extent, sizes)
        if "segmentation" in self.families:
            for image, image_patches, size in zip(batch, patches, sizes, strict=True):
                mask_path = self.data.masks[image]
                if mask_path is not None:
                    target = read_mask(mask_path, size, len(self.data.classes), self.data.mask_coding)
                    self._segment(target, image_patches, grid, extent)

    def _add_captions(
        self,
        batch: Sequence[int],
        patches: Tensor,
        grid: tuple[int, int],
        extent: tuple[float, float],
        sizes: Sequence[tuple[int, int]],
    ) -> None:
        captions = [caption for image in batch for caption in self.captions_of[image]]
        features, mask = self.encoder.tokens([self.data.captions[caption] for caption in captions])
        rows = {caption: row for row, caption in enumerate(captions)}
        first = [rows[self.captions_of[image][0]] for image in batch]
        if "image_dependence" in self.families and len(batch) > 1 and mask[first].any():
            self.dependence.append(
                image_dependence(
                    patches,
                    features[first],
                    mask[first],
                    self.scale,
                    threshold=self.options.threshold,
                    alignment=self.options.alignment,
                )
            )
        for image, image_patches, size in zip(batch, patches, sizes, strict=True):
            for caption in self.captions_of[image] if "pointing" in self.families else ():
                self._point(caption, features[rows[caption]], image_patches, grid, extent, size)

    def pointing(self) -> list[Measure]:
        measures = []
        for name, games in self.games.items():
            if games:
                value, chance, ceiling = torch.tensor(games).mean(dim=0).tolist()
                measures.append(Measure(f"{name}_pointing", value, chance, ceiling, len(games)))
        return measures

    def segmentation(self) -> list[Measure]:
        measures = []
        for name in dict.fromkeys(name for name, _ in self.totals):
            background = name == "mean_iou_with_background"
            value, chance, ceiling = (
                mean_iou(*self.totals[name, kind], background=background) for kind in ("value", "chance", "ceiling")
            )
            unions = self.totals[name, "value"][1]
            count = int(((unions if background else unions[:-1]) > 0).sum())
            measures.append(Measure(name, value, chance, ceiling, count))
        return measures

    def _point(
        self,
        caption: int,
        token_features: Tensor,
        patches: Tensor,
        grid: tuple[int, int],
        extent: tuple[float, float],
        size: tuple[int, int],
    ) -> None:
        objects = self.data.objects[caption]
        if not objects:
            return
        # A phrase or word with several boxes is found in any of them.
        of_phrases: dict[str, Tensor] = {}
        of_words: dict[int, Tensor] = {}
        for each in objects:
            left, top, right, bottom = each.box
            if left >= size[1] or top >= size[0] or right <= 0 or bottom <= 0:
                raise DataError(
                    f"{self.data.images[self.data.image_index[caption]]} is {size[1]} pixels wide and {size[0]} high; "
                    f"the box {list(each.box)} of {each.phrase!r} lies outside"
                )
            box = box_masks(torch.tensor([each.box]), *size)
            of_phrases[each.phrase] = of_phrases.get(each.phrase, box) | box
            for word in each.words:
                of_words[word] = of_words.get(word, box) | box
        unit = F.normalize(patches, dim=-1)
        for phrase, mask in of_phrases.items():
            index = self.phrases[phrase]
            for name, features in (("phrase", self.phrase_features), ("phrase_tokens", self.phrase_token_features)):
                self._play(name, unit @ features[index], grid, extent, mask)
        positions = word_positions(self.encoder.tokenizer, self.data.captions[caption]) if of_words else []
        for word, mask in of_words.items():
            if positions[word]:
                embedding = token_features[positions[word]].mean(dim=0)
                similarity = token_patch_similarity(embedding[None, None], patches[None])[0, 0]
                self._play("word", similarity, grid, extent, mask)

    def _play(
        self, name: str, similarity: Tensor, grid: tuple[int, int], extent: tuple[float, float], mask: Tensor
    ) -> None:
        hits, chance, reachable = pointing_game(similarity[None], grid, mask, extent)
        self.games[name].append((float(hits), float(chance), float(reachable)))

    def _segment(self, target: Tensor, patches: Tensor, grid: tuple[int, int], extent: tuple[float, float]) -> None:
        count = len(self.data.classes)
        present = [label for label in target.unique().tolist() if label not in (BACKGROUND, IGNORED)]
        if not present or self.class_features is None:
            return
        height, width = target.shape
        labels, scores = segment(patches, self.class_features, grid, (height, width), present=present, extent=extent)
        variants = {"mean_iou_of_objects": (labels, False), "mean_iou": (labels, False)}
        if self.options.background_threshold is not None:
            with_background = labels.masked_fill(scores < self.options.background_threshold, BACKGROUND)
            variants["mean_iou_with_background"] = (with_background, True)
        kept = target != IGNORED
        for name, (predicted, background) in variants.items():
            ignore = BACKGROUND if name == "mean_iou_of_objects" else None
            best = majority_segmentation(target, grid, count, background=background, ignore=IGNORED, extent=extent)
            totals = {
                "value": intersection_and_union(predicted[kept], target[kept], count, ignore),
                "chance": random_intersection_and_union(
                    target[kept], count, present, background=background, ignore=ignore
                ),
                "ceiling": intersection_and_union(best[kept], target[kept], count, ignore),
            }
            for kind, total in totals.items():
                self.totals[name, kind] = self.totals.get((name, kind), 0) + torch.stack(total)


def _pooled_measures(
    image_features: Tensor,
    text_features: Tensor | None,
    class_features: Tensor | None,
    encoder: Encoder,
    data: EvaluationData,
    options: Options,
) -> list[Measure]:
    measures: list[Measure] = []
    if text_features is not None:
        if "retrieval" in options.families:
            measures += _retrieval(image_features, text_features, data)
        if "faithfulness" in options.families:
            measures += _faithfulness(image_features, text_features, data, options)
        if "hard_negatives" in options.families:
            measures += _hard_negatives(image_features, text_features, encoder, data)
    if "classification" in options.families:
        measures += _classification(image_features, class_features, data)
    return measures


def _retrieval(image_features: Tensor, text_features: Tensor, data: EvaluationData) -> list[Measure]:
    images, captions = len(image_features), len(text_features)
    right = [len(own) for own in data.captions_of()]
    measures: dict[str, list[Measure]] = {"image_to_text": [], "text_to_image": []}
    for k in (1, 5, 10):
        if k > images:
            break
        recall = recall_at_k(image_features, text_features, k, torch.tensor(data.image_index))
        chance = sum(recall_chance(captions, k, number) for number in right) / images
        measures["image_to_text"].append(Measure(f"image_to_text_R@{k}", recall.image_to_text, chance, 1.0, images))
        chance = recall_chance(images, k)
        measures["text_to_image"].append(Measure(f"text_to_image_R@{k}", recall.text_to_image, chance, 1.0, captions))
    return [*measures["image_to_text"], *measures["text_to_image"]]


def _faithfulness(
    image_features: Tensor, text_features: Tensor, data: EvaluationData, options: Options
) -> list[Measure]:
    image_index = torch.tensor(data.image_index)
    retrieved = nearest_captions(image_features, text_features, image_index)
    forms = {"k_precision": None, "k_precision_of_nouns_and_adjectives": options.nouns_and_adjectives}
    measures = []
    for name, counts in forms.items():
        if name != "k_precision" and counts is None:
            continue
        result = k_precision(data.captions, retrieved, image_index, counts)
        count = int((~result.precision.isnan()).sum())
        if count:
            value, chance = (values.nanmean().item() for values in result)
            measures.append(Measure(name, value, chance, 1.0, count))
    return measures


def _hard_negatives(
    image_features: Tensor, text_features: Tensor, encoder: Encoder, data: EvaluationData
) -> list[Measure]:
    pairs = [(caption, text) for caption, text in enumerate(data.hard_negatives) if text is not None]
    if not pairs:
        return []
    captions = [caption for caption, _ in pairs]
    negatives = encoder.texts([text for _, text in pairs], "hard negatives")
    images = image_features[[data.image_index[caption] for caption in captions]]
    accuracy = hard_negative_accuracy(images, text_features[captions], negatives)
    measures = [Measure("hard_negative_accuracy", accuracy, HARD_NEGATIVE_CHANCE, 1.0, len(pairs))]
    rows: dict[str, list[int]] = {}
    for row, caption in enumerate(captions):
        group = data.groups[caption] if data.groups else None
        if group is not None:
            rows.setdefault(group, []).append(row)
    if rows:
        of_groups = [
            hard_negative_accuracy(images[own], text_features[captions][own], negatives[own]) for own in rows.values()
        ]
        mean = sum(of_groups) / len(of_groups)
        measures.append(Measure("hard_negative_accuracy_of_groups", mean, HARD_NEGATIVE_CHANCE, 1.0, len(of_groups)))
    return measures


def _classification(image_features: Tensor, class_features: Tensor | None, data: EvaluationData) -> list[Measure]:
    labelled = [image for image, label in enumerate(data.labels) if label is not None]
    if not labelled or class_features is None:
        return []
    target = torch.tensor([data.labels[image] for image in labelled])
    count = len(class_features)
    return [
        Measure(
            f"zero_shot_top{k}",
            top_k_accuracy(image_features[labelled], class_features, target, k),
            recall_chance(count, k),
            1.0,
            len(labelled),
        )
        for k in (1, 5)
        if k <= count
    ]
