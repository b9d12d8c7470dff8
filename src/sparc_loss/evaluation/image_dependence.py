"""Does the fine-grained loss use the image?

A token's group of patches c_l is close to (sum_p v_p v_p^T) t_l, so any image whose patches span the directions of the
tokens solves the task of Eq. 6: the loss can fall to nearly zero without using the content of the image. This probe
measures the loss again with patches of other images. If that changes nothing, the loss trains nothing about the
image, whatever its value.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparc_loss._checks import check_features, check_mask
from sparc_loss._nearest import own_is_nearest
from sparc_loss.functional import (
    Alignment,
    alignment_weights,
    language_grouped_embeddings,
    sequence_contrastive_loss,
    token_patch_similarity,
)


class TokenMatching(NamedTuple):
    """How well the tokens of a caption and their groups of patches find each other: means over valid tokens.

    Attributes:
        loss: the fine-grained loss (Eq. 6, reduction "token").
        token_accuracy: share of the tokens whose own group is nearest to them among the caption's groups.
        group_accuracy: share of the groups whose own token is nearest to them among the caption's tokens.
    """

    loss: float
    token_accuracy: float
    group_accuracy: float


class ImageDependence(NamedTuple):
    """Token matching with the right patches and with wrong ones.

    Attributes:
        right: each caption with its own image.
        shuffled: each caption with another image of the batch.
        constant: each caption with the mean, patch by patch, of the other images of the batch.
        chance: of both accuracies, 1 / the number of tokens of a caption, mean over the tokens.
        tokens: the number of valid tokens.
    """

    right: TokenMatching
    shuffled: TokenMatching
    constant: TokenMatching
    chance: float
    tokens: int

    @property
    def shuffled_gap(self) -> TokenMatching:
        """The difference between right and shuffled images. If it is about 0, the loss does not use the image."""
        return _gap(self.right, self.shuffled)

    @property
    def constant_gap(self) -> TokenMatching:
        """The difference between right and constant images."""
        return _gap(self.right, self.constant)


@torch.no_grad()
def image_dependence(
    patch_features: Tensor,
    token_features: Tensor,
    token_mask: Tensor,
    logit_scale: Tensor | float,
    *,
    threshold: float | None = None,
    alignment: Alignment = "sparse",
) -> ImageDependence:
    """Measure a batch with right, shuffled and constant images.

    "Shuffled" uses the image of the next row, so the result depends only on the batch; neighbours should not be alike.
    "Constant" uses the mean of the other images, which has a patch for every place and nothing of the caption's own
    image. (With an image of zeros or of one colour, all groups would be equal and every match a tie.) A tie is a miss.
    In a caption of one token every match is right; `chance` includes this.

    There is no `region_mask`, because with given patches for each word the task differs.

    Args:
        patch_features: floating point [B, P, D], not normalised; no image twice, B at least 2.
        token_features: floating point [B, L, D], not normalised.
        token_mask: bool [B, L], True for valid tokens.
        logit_scale: 1/tau of the loss, a number or a tensor of one element.
        threshold: sigma of Eq. 3, in [0, 1]; None is 1/P.
        alignment: "sparse", "dense" or "softmax", see `functional.alignment_weights`.

    Raises:
        TypeError: features not floating point, a mask not bool.
        ValueError: shapes or devices that disagree, values that are not finite, fewer than 2 images, no valid
            token.
    """
    check_features("b p d, b l d", patch_features=patch_features, token_features=token_features)
    check_mask("token_mask", token_mask, token_features.shape[:2], "b l", token_features.device)
    batch = len(patch_features)
    if batch < 2:
        raise ValueError(f"patch_features has B = {batch}; expected 2 or more images, to shuffle them")
    if not token_mask.any():
        raise ValueError("token_mask is False everywhere; expected a valid token")
    for name, features in (("patch_features", patch_features), ("token_features", token_features[token_mask])):
        if not features.isfinite().all():
            raise ValueError(f"{name} has values that are not finite; expected finite ones")
    patch_features = patch_features.to(torch.promote_types(patch_features.dtype, torch.float32))
    others = (patch_features.sum(dim=0, keepdim=True) - patch_features) / (batch - 1)

    def match(patches: Tensor) -> TokenMatching:
        weights = alignment_weights(token_patch_similarity(token_features, patches), threshold, alignment)
        grouped = language_grouped_embeddings(weights, patches)
        loss = sequence_contrastive_loss(grouped, token_features, token_mask, logit_scale)
        cosine = F.normalize(token_features.to(grouped.dtype), dim=-1) @ F.normalize(grouped, dim=-1).mT
        found = (own_is_nearest(each, token_mask)[token_mask].double().mean().item() for each in (cosine, cosine.mT))
        return TokenMatching(loss.item(), *found)

    tokens = int(token_mask.sum())
    return ImageDependence(
        right=match(patch_features),
        shuffled=match(patch_features.roll(-1, dims=0)),
        constant=match(others),
        chance=int(token_mask.any(dim=1).sum()) / tokens,
        tokens=tokens,
    )


def mean_image_dependence(batches: Sequence[ImageDependence]) -> ImageDependence:
    """The mean over the tokens of several batches.

    Raises:
        ValueError: no batch.
    """
    if not batches:
        raise ValueError("batches is empty; expected at least one")
    tokens = sum(batch.tokens for batch in batches)

    def mean(values: Sequence[float]) -> float:
        return sum(value * batch.tokens for value, batch in zip(values, batches, strict=True)) / tokens

    def matching(parts: Sequence[TokenMatching]) -> TokenMatching:
        return TokenMatching(*(mean(values) for values in zip(*parts, strict=True)))

    return ImageDependence(
        right=matching([batch.right for batch in batches]),
        shuffled=matching([batch.shuffled for batch in batches]),
        constant=matching([batch.constant for batch in batches]),
        chance=mean([batch.chance for batch in batches]),
        tokens=tokens,
    )


def _gap(right: TokenMatching, wrong: TokenMatching) -> TokenMatching:
    return TokenMatching(
        wrong.loss - right.loss,
        right.token_accuracy - wrong.token_accuracy,
        right.group_accuracy - wrong.group_accuracy,
    )
