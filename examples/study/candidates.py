"""Other ways to contrast captions with other images than `image_contrastive_loss`, each different in one respect.

None of them did better than the recipe; docs/study.md has their figures.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparc_loss import SparcLoss
from sparc_loss.functional import (
    Alignment,
    alignment_weights,
    available_negatives,
    images_of_captions,
    language_grouped_embeddings,
    places_by_image,
    token_patch_similarity,
)
from sparc_loss.losses.outputs import ModelOutputs

Queries = Literal["words", "captions", "both"]
Choice = Literal["softmax", "sigmoid", "sigmoid with a bias", "softmax of each word"]
Images = Literal["next", "most similar"]
Schedule = Literal["constant", "weight grows", "images grow", "weights fall"]

# Images with which a whole caption is contrasted: one query costs what a word costs, and captions have 6 to 25.
CAPTION_NEGATIVES = 16


class CandidateLoss(SparcLoss):
    """SPARC and a contrast with other images, in both directions unless stated, for batches without masks of patches.

    Args:
        queries: "words"; "captions", whose embedding is one query with `CAPTION_NEGATIVES` images (FLAIR without its
            parameters); or the sum of both.
        choice: how a caption chooses its image: by a softmax; by a sigmoid of each score, centred at the mean of all
            scores instead of SigLIP's learned bias; by the same with a learned bias, which begins at the logit of
            1 / (1 + K); by a softmax of each word (Info-Ground), from text to image.
        images: the next K of the batch, or the K whose global embeddings are most similar to the caption's, from text
            to image.
        contrast_alignment: of the contrast, see `alignment_weights`.
        contrast_scale: 1/temperature of the contrast; None is the model's.
        schedule: what changes linearly with `progress`: nothing; the contrast's weight grows from 0; K grows from 1;
            or both weights fall to a tenth.
        settings: of `SparcLoss`.
    """

    def __init__(
        self,
        queries: Queries = "words",
        choice: Choice = "softmax",
        images: Images = "next",
        contrast_alignment: Alignment = "sparse",
        contrast_scale: float | None = None,
        schedule: Schedule = "constant",
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.queries = queries
        self.choice = choice
        self.images = images
        self.contrast_alignment = contrast_alignment
        self.contrast_scale = contrast_scale
        self.schedule = schedule
        self.bias = nn.Parameter(torch.tensor(-math.log(self.image_negatives))) if choice.endswith("bias") else None
        self.progress = 1.0  # share of the steps that are done; the training loop sets it

    def fine_grained_term(self, outputs: ModelOutputs) -> Tensor:
        return self._fallen() * super().fine_grained_term(outputs)

    def further_terms(self, outputs: ModelOutputs) -> dict[str, Tensor]:
        grown = self.progress if self.schedule == "weight grows" else 1.0
        weight = grown * self._fallen() * self.image_contrastive_weight
        negatives = self.image_negatives
        if self.schedule == "images grow":
            negatives = 1 + round(self.progress * (negatives - 1))
        loss = outputs.patch_features.new_zeros(())
        if self.queries in ("words", "both"):
            loss = loss + self._contrast(outputs.token_features, outputs.token_mask, negatives, outputs)
        if self.queries in ("captions", "both"):
            captions = outputs.text_features.unsqueeze(1)
            valid = torch.ones(captions.shape[:2], dtype=torch.bool, device=captions.device)
            loss = loss + self._contrast(captions, valid, CAPTION_NEGATIVES, outputs)
        return {"image_contrastive_loss": weight * loss}

    def _fallen(self) -> float:
        """The share of both weights that is left."""
        return 1 - 0.9 * self.progress if self.schedule == "weights fall" else 1.0

    def _contrast(self, queries: Tensor, valid: Tensor, negatives: int, outputs: ModelOutputs) -> Tensor:
        number = available_negatives(negatives, len(queries))
        if self.images == "most similar":
            images = self._nearest(outputs, number)
        else:
            images = images_of_captions(len(queries), 1 + number, queries.device)
        cosines = torch.stack(
            [self._cosines(queries, outputs.patch_features[each]) for each in images.unbind(dim=1)], dim=1
        )
        scale = outputs.logit_scale if self.contrast_scale is None else self.contrast_scale
        if self.choice == "softmax of each word":
            logits = cosines * scale
            return (logits.logsumexp(dim=1) - logits[:, 0])[valid].mean()
        scores = cosines.where(valid.unsqueeze(1), 0).sum(dim=-1) / valid.sum(dim=-1, keepdim=True).clamp(min=1)
        if self.choice.startswith("sigmoid"):
            logits = (scores - scores.mean().detach()) * scale
            if self.bias is not None:
                logits = logits + self.bias
            return -(F.logsigmoid(logits[:, 0]) + F.logsigmoid(-logits[:, 1:]).sum(dim=1)).mean()
        logits = scores * scale
        loss = logits.logsumexp(dim=1) - logits[:, 0]
        if self.image_contrastive_direction == "both" and self.images == "next":
            by_image = logits[places_by_image(logits)]
            loss = (loss + by_image.logsumexp(dim=1) - by_image[:, 0]) / 2
        return loss.mean()

    def _cosines(self, queries: Tensor, patches: Tensor) -> Tensor:
        """cos(t_l, c_l) of every query with its group of patches, [B, L]."""
        threshold = self.threshold if self.image_contrastive_threshold is None else self.image_contrastive_threshold
        weights = alignment_weights(token_patch_similarity(queries, patches), threshold, self.contrast_alignment)
        return F.cosine_similarity(language_grouped_embeddings(weights, patches), queries, dim=-1)

    def _nearest(self, outputs: ModelOutputs, number: int) -> Tensor:
        """Each caption's own image and the images most similar to it, [B, 1 + K]."""
        similarity = (outputs.text_features @ outputs.image_features.mT).detach()
        own = torch.arange(len(similarity), device=similarity.device)
        others = similarity.index_put((own, own), similarity.new_tensor(-torch.inf)).topk(number).indices
        return torch.cat([own[:, None], others], dim=1)
