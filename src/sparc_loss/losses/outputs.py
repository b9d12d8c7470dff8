"""What an objective computes its terms from: the outputs of a surfaced model."""

from typing import NamedTuple

import torch
from torch import Tensor

from sparc_loss._checks import check_mask
from sparc_loss._masks import zero_where_masked


class ModelOutputs(NamedTuple):
    """The checked arguments of `Objective.forward`.

    Attributes:
        image_features: [B, D], L2-normalised.
        text_features: [B, D], L2-normalised.
        logit_scale: 1/tau of the fine-grained term.
        patch_features: [B, P, D], not normalised.
        token_features: [B, L, D], not normalised.
        token_mask: bool [B, L], True for valid tokens.
        patch_mask: bool [B, P] or None, False for padding patches.
        region_mask: bool [B, L, P] or None, True for the patches a token may use.
        further: the objective's `further_inputs` by name.
    """

    image_features: Tensor
    text_features: Tensor
    logit_scale: Tensor | float
    patch_features: Tensor
    token_features: Tensor
    token_mask: Tensor
    patch_mask: Tensor | None
    region_mask: Tensor | None
    further: dict[str, Tensor]

    def without_regions(self, name: str) -> "LocalOutputs":
        """Patches and tokens for `name`, an objective in which every token may use every patch; see below."""
        masks = self.token_mask, self.patch_mask, self.region_mask
        return local_outputs_without_regions(name, self.patch_features, self.token_features, *masks)


class LocalOutputs(NamedTuple):
    """Patches and tokens, zero where they are masked, with a mask for each.

    Attributes:
        patch_features: [B, P, D].
        patch_mask: bool [B, P].
        token_features: [B, L, D].
        token_mask: bool [B, L].
    """

    patch_features: Tensor
    patch_mask: Tensor
    token_features: Tensor
    token_mask: Tensor


def local_outputs_without_regions(
    name: str,
    patch_features: Tensor,
    token_features: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    region_mask: Tensor | None,
) -> LocalOutputs:
    """Check and mask the inputs of `name`, an objective in which every token may use every patch.

    Raises:
        TypeError: a mask not bool.
        ValueError: wrong shapes or devices; no pair, patch or token at all; a region_mask.
    """
    for feature_name, features in (("patch_features", patch_features), ("token_features", token_features)):
        if 0 in features.shape:
            raise ValueError(f"{feature_name} has shape {list(features.shape)}; expected no size of 0")
    check_mask("token_mask", token_mask, token_features.shape[:2], "b l", token_features.device)
    if region_mask is not None:
        raise ValueError(f"region_mask is given; expected None: {name} lets every token use every patch")
    if patch_mask is not None:
        check_mask("patch_mask", patch_mask, patch_features.shape[:2], "b p", patch_features.device)
    every_patch = torch.ones(patch_features.shape[:2], dtype=torch.bool, device=patch_features.device)
    return LocalOutputs(
        zero_where_masked(patch_features, patch_mask),
        every_patch if patch_mask is None else patch_mask,
        zero_where_masked(token_features, token_mask),
        token_mask,
    )
