"""MGCA: global, token and prototype alignment of image and text (NeurIPS 2022, arXiv 2210.06044)."""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from sparc_loss._arithmetic import autocast_disabled
from sparc_loss._checks import check_features, check_number, check_positive, check_whole_number
from sparc_loss.functional import sequence_contrastive_loss
from sparc_loss.losses.distributed import gathered
from sparc_loss.losses.objective import GlobalLossArguments, Objective, zero_of
from sparc_loss.losses.outputs import ModelOutputs, local_outputs_without_regions

if TYPE_CHECKING:
    from typing_extensions import Unpack

FURTHER_INPUTS = ("attended_patches", "attended_tokens", "image_prototype_logits", "text_prototype_logits")


class MgcaLoss(Objective):
    """The global loss, token alignment within each pair and cross-modal prototype alignment, weighted 1 : 1 : 1.

    - Token alignment: cross-attention computes a counterpart from the patches for every token, and one from the tokens
      for every patch (`MgcaHeads`). Within a pair each token is contrasted with the counterparts of the other tokens,
      symmetrically, and each patch likewise. All tokens of a caption have the same weight, and all patches of an
      image: the SPARC paper omits MGCA's weights by the class token. The term is the mean of both sides over the
      batch, with `logit_scale` as temperature. A caption without tokens adds nothing, nor do the patches of its image.
    - Prototype alignment: three Sinkhorn steps distribute the images of all ranks evenly over the prototypes, and the
      texts as well. Each image and text must predict its partner's assignment by a softmax over prototypes, with a
      fixed temperature.

    The attention and the prototypes are learned, so they belong to the model, which open_clip optimises. This loss
    has no parameters and takes the outputs of `MgcaHeads`. Over W ranks of B pairs each rank receives the prototype
    logits of all ranks, 2 * W * B * K numbers without gradient, for the Sinkhorn steps; B must be the same on each.

    Args:
        global_weight, fine_grained_weight, prototype_weight: of the three terms; 0 skips the computation of a term.
        prototype_scale: 1/temperature of the prediction; 5 as in MGCA's code.
        sinkhorn_epsilon: temperature of the assignment.
        sinkhorn_steps: number of steps; each normalises the prototypes, then the samples.
        fine_grained_scale, global_loss, local_loss, gather_with_grad, cache_labels, rank, world_size: see `Objective`.

    Raises:
        TypeError, ValueError, ImportError: as `Objective`; a prototype_weight that is not a number of at least 0, a
            scale or epsilon that is not above 0, a sinkhorn_steps that is not a whole number of at least 1.

    Example:
        >>> heads = MgcaHeads(embed_dim=512)                             # its parameters go to the optimizer
        >>> outputs = model(images, texts)                               # doctest: +SKIP
        >>> total = MgcaLoss()(**outputs, **heads(**outputs))            # doctest: +SKIP
    """

    further_inputs = FURTHER_INPUTS
    settings = (
        "global_weight",
        "fine_grained_weight",
        "prototype_weight",
        "prototype_scale",
        "sinkhorn_epsilon",
        "sinkhorn_steps",
        "fine_grained_scale",
    )

    def __init__(
        self,
        global_weight: float = 1.0,
        fine_grained_weight: float = 1.0,
        prototype_weight: float = 1.0,
        prototype_scale: float = 5.0,
        sinkhorn_epsilon: float = 0.05,
        sinkhorn_steps: int = 3,
        fine_grained_scale: float | None = None,
        **shared: "Unpack[GlobalLossArguments]",
    ) -> None:
        super().__init__(global_weight, fine_grained_weight, fine_grained_scale, **shared)
        check_number("prototype_weight", prototype_weight, 0)
        check_positive("prototype_scale", prototype_scale)
        check_positive("sinkhorn_epsilon", sinkhorn_epsilon)
        check_whole_number("sinkhorn_steps", sinkhorn_steps, 1)
        self.prototype_weight = prototype_weight
        self.prototype_scale = prototype_scale
        self.sinkhorn_epsilon = sinkhorn_epsilon
        self.sinkhorn_steps = sinkhorn_steps

    def fine_grained_term(self, outputs: ModelOutputs) -> Tensor:
        """Token alignment of this rank's pairs, a scalar: the mean over ranks is that of the whole batch."""
        patches, patch_mask, tokens, token_mask = outputs.without_regions("MgcaLoss")
        valid_tokens = token_mask & patch_mask.any(dim=1, keepdim=True)
        valid_patches = patch_mask & token_mask.any(dim=1, keepdim=True)
        attended_patches, attended_tokens = (outputs.further[name] for name in ("attended_patches", "attended_tokens"))
        check_features(
            "b p d, b l d, b l d, b p d",
            patch_features=patches,
            token_features=tokens,
            attended_patches=attended_patches,
            attended_tokens=attended_tokens,
        )
        scale = outputs.logit_scale
        by_token = sequence_contrastive_loss(attended_patches, tokens, valid_tokens, scale, "sample")
        by_patch = sequence_contrastive_loss(attended_tokens, patches, valid_patches, scale, "sample")
        return (by_token + by_patch) / 2

    def further_terms(self, outputs: ModelOutputs) -> dict[str, Tensor]:
        """{"prototype_loss": ...}, weighted."""
        images, texts = (outputs.further[name] for name in ("image_prototype_logits", "text_prototype_logits"))
        check_features(
            "b p d, b k, b k",
            patch_features=outputs.patch_features,
            image_prototype_logits=images,
            text_prototype_logits=texts,
        )
        if self.prototype_weight == 0:
            return {"prototype_loss": zero_of(images, texts)}
        loss = (self._prediction_loss(images, texts) + self._prediction_loss(texts, images)) / 2
        return {"prototype_loss": self.prototype_weight * loss}

    def _prediction_loss(self, assigned: Tensor, predicting: Tensor) -> Tensor:
        """Cross-entropy of one side's prediction [B, K] with the assignment from the other's logits [B, K]."""
        with torch.no_grad():
            everywhere = gathered(assigned, self.world_size)
            assignment = sinkhorn(everywhere, self.sinkhorn_epsilon, self.sinkhorn_steps)
            here = dist.get_rank() if self.world_size > 1 else 0
            assignment = assignment[here * len(assigned) :][: len(assigned)]
        return -(assignment * (predicting * self.prototype_scale).log_softmax(dim=1)).sum(dim=1).mean()


def sinkhorn(logits: Tensor, epsilon: float, steps: int) -> Tensor:
    """Assignment of B samples to K prototypes, close to exp(logits / epsilon), that distributes the samples evenly.

    Each step scales all prototypes to the same total, then all samples to a total of one.

    Shape:
        logits: [B, K].
        Returns [B, K]; each row sums to one.
    """
    log_assignment = logits / epsilon
    for _ in range(steps):
        log_assignment = log_assignment.log_softmax(dim=0).log_softmax(dim=1)
    return log_assignment.exp()


class CrossAttention(nn.Module):
    """Attention with one head from one sequence to another, with a layer norm before and a projection after.

    Args:
        embed_dim: D, of both sequences and of the output.
        head_dim: of queries, keys and values.
    """

    def __init__(self, embed_dim: int, head_dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(embed_dim, head_dim, bias=False)
        self.key = nn.Linear(embed_dim, head_dim, bias=False)
        self.value = nn.Linear(embed_dim, head_dim, bias=False)
        self.output = nn.Linear(head_dim, embed_dim, bias=False)

    def forward(self, queries: Tensor, context: Tensor, context_mask: Tensor) -> Tensor:
        """[B, N, D] from queries [B, N, D] and context [B, M, D], where `context_mask`, bool [B, M], is True.

        Without any valid context the output is 0.
        """
        queries, context = F.layer_norm(queries, queries.shape[-1:]), F.layer_norm(context, context.shape[-1:])
        usable = context_mask | ~context_mask.any(dim=1, keepdim=True)
        logits = self.query(queries) @ self.key(context).transpose(1, 2) / self.query.out_features**0.5
        weights = logits.masked_fill(~usable[:, None], -torch.inf).softmax(dim=-1)
        # Zero without valid context, so that its gradient is zero, too.
        weights = weights.masked_fill(~context_mask[:, None], 0)
        return self.output(weights @ self.value(context))


class MgcaHeads(nn.Module):
    """The parameters of MGCA beside the two encoders: cross-attention in both directions, and the prototypes.

    The computation is in the dtype of the parameters, float32, whatever the autocast.

    Args:
        embed_dim: D of all features.
        head_dim: of the one attention head; 128 in the SPARC paper.
        prototypes: K; 500 in the SPARC paper.

    Raises:
        TypeError, ValueError: a size that is not a whole number of at least 1.
    """

    def __init__(self, embed_dim: int, head_dim: int = 128, prototypes: int = 500) -> None:
        super().__init__()
        check_whole_number("head_dim", head_dim, 1)
        check_whole_number("prototypes", prototypes, 1)
        self.tokens_to_patches = CrossAttention(embed_dim, head_dim)
        self.patches_to_tokens = CrossAttention(embed_dim, head_dim)
        self.prototypes = nn.Parameter(torch.randn(prototypes, embed_dim))

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        patch_features: Tensor,
        token_features: Tensor,
        token_mask: Tensor,
        patch_mask: Tensor | None = None,
        **_: Tensor,
    ) -> dict[str, Tensor]:
        """The inputs of `MgcaLoss` beyond the model's outputs, which are the arguments here.

        Args:
            image_features: [B, D], L2-normalised.
            text_features: [B, D], L2-normalised.
            patch_features: [B, P, D].
            token_features: [B, L, D].
            token_mask: bool [B, L], True for valid tokens.
            patch_mask: bool [B, P] or None, False for padding patches.

        Returns:
            attended_patches [B, L, D], the attention of each token to the patches; attended_tokens [B, P, D], that of
            each patch to the valid tokens; image_prototype_logits and text_prototype_logits [B, K], cosines.

        Raises:
            TypeError: features not floating point, a mask not bool.
            ValueError: ranks, sizes or devices that disagree.
        """
        check_features(
            "b d, b d, b p d, b l d",
            image_features=image_features,
            text_features=text_features,
            patch_features=patch_features,
            token_features=token_features,
        )
        patches, patch_mask, tokens, token_mask = local_outputs_without_regions(
            "MgcaHeads", patch_features, token_features, token_mask, patch_mask, None
        )
        dtype = self.prototypes.dtype
        with autocast_disabled(patches.device):
            patches, tokens = patches.to(dtype), tokens.to(dtype)
            prototypes = F.normalize(self.prototypes, dim=-1)
            return {
                "attended_patches": self.tokens_to_patches(tokens, patches, patch_mask),
                "attended_tokens": self.patches_to_tokens(patches, tokens, token_mask),
                "image_prototype_logits": image_features.to(dtype) @ prototypes.T,
                "text_prototype_logits": text_features.to(dtype) @ prototypes.T,
            }
