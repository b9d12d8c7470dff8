"""MGCA: global, token and prototype alignment of image and text (NeurIPS 2022, arXiv 2210.06044)."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from sparc_loss._validation import check_features, check_number
from sparc_loss.functional import autocast_disabled, sequence_contrastive_loss, zero_where_masked
from sparc_loss.losses.all_pairs import check_masks, gathered
from sparc_loss.losses.objective import Objective, check_positive, zero_of

FURTHER_INPUTS = ("attended_patches", "attended_tokens", "image_prototype_logits", "text_prototype_logits")


class MgcaLoss(Objective):
    """The global loss, token alignment within each pair and cross-modal prototype alignment, weighted 1 : 1 : 1.

    - Token alignment: cross-attention gives every token a patch-side and every patch a token-side counterpart
      (`MgcaHeads`); within a pair each token is contrasted with the counterparts of the others, symmetrically, and so
      is each patch. All tokens of a caption weigh the same, as do all patches of an image: the SPARC paper leaves out
      MGCA's weights by the class token. Mean of the two sides, over the batch; its temperature is `logit_scale`.
      A caption without a token adds nothing, nor do the patches of its image.
    - Prototype alignment: three Sinkhorn steps assign the images of all ranks evenly to prototypes, and the texts
      too; each must predict its partner's assignment by a softmax over prototypes. Its temperature is fixed.

    The attention and the prototypes are learned, so they belong to the model, which open_clip optimises: this loss
    has no parameters and takes what `MgcaHeads` computes. Over W ranks of B pairs each rank receives the prototype
    logits of all, 2 * W * B * K numbers without gradient, for the Sinkhorn steps; B must be the same on each.

    Args:
        global_weight, fine_grained_weight, prototype_weight: of the three terms; 0 skips a term's work.
        prototype_scale: 1/temperature of the prediction; 5 is that of MGCA's code.
        sinkhorn_epsilon: temperature of the assignment.
        sinkhorn_steps: each evens out the prototypes, then the samples.
        fine_grained_scale, global_loss, local_loss, gather_with_grad, cache_labels, rank, world_size: see `Objective`.

    Raises:
        TypeError, ValueError, ImportError: as `Objective`; a prototype_weight below 0, a scale, an epsilon or a
            number of steps not above 0.

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
        global_loss: nn.Module | None = None,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(
            global_weight=global_weight,
            fine_grained_weight=fine_grained_weight,
            fine_grained_scale=fine_grained_scale,
            global_loss=global_loss,
            local_loss=local_loss,
            gather_with_grad=gather_with_grad,
            cache_labels=cache_labels,
            rank=rank,
            world_size=world_size,
        )
        check_number("prototype_weight", prototype_weight, 0)
        check_positive("prototype_scale", prototype_scale)
        check_positive("sinkhorn_epsilon", sinkhorn_epsilon)
        if sinkhorn_steps != int(sinkhorn_steps) or sinkhorn_steps < 1:
            raise ValueError(f"sinkhorn_steps is {sinkhorn_steps}; expected a whole number above 0")
        self.prototype_weight = prototype_weight
        self.prototype_scale = prototype_scale
        self.sinkhorn_epsilon = sinkhorn_epsilon
        self.sinkhorn_steps = sinkhorn_steps

    def fine_grained_term(
        self,
        *,
        logit_scale: Tensor | float,
        patch_features: Tensor,
        token_features: Tensor,
        token_mask: Tensor,
        patch_mask: Tensor | None,
        region_mask: Tensor | None,
        attended_patches: Tensor,
        attended_tokens: Tensor,
        **_: Tensor,
    ) -> Tensor:
        """Token alignment of this rank's pairs, a scalar: the mean over ranks is that of the whole batch."""
        patch_mask = check_masks("MgcaLoss", patch_features, token_features, token_mask, patch_mask, region_mask)
        token_counts = token_mask & patch_mask.any(dim=1, keepdim=True)
        patch_counts = patch_mask & token_mask.any(dim=1, keepdim=True)
        by_token = sequence_contrastive_loss(attended_patches, token_features, token_counts, logit_scale, "sample")
        by_patch = sequence_contrastive_loss(attended_tokens, patch_features, patch_counts, logit_scale, "sample")
        return (by_token + by_patch) / 2

    def further_terms(self, *, image_prototype_logits: Tensor, text_prototype_logits: Tensor, **_: Tensor) -> dict:
        """{"prototype_loss": ...}, weighted."""
        check_features(
            "b k, b k", image_prototype_logits=image_prototype_logits, text_prototype_logits=text_prototype_logits
        )
        if self.prototype_weight == 0:
            return {"prototype_loss": zero_of(image_prototype_logits, text_prototype_logits)}
        by_image = self._prediction_loss(image_prototype_logits, text_prototype_logits)
        by_text = self._prediction_loss(text_prototype_logits, image_prototype_logits)
        return {"prototype_loss": self.prototype_weight * (by_image + by_text) / 2}

    def _prediction_loss(self, assigned: Tensor, predicting: Tensor) -> Tensor:
        """Cross-entropy of what one side predicts, [B, K], with the assignment of the other side's logits [B, K]."""
        with torch.no_grad():
            everywhere = gathered(assigned, self.world_size)
            assignment = sinkhorn(everywhere, self.sinkhorn_epsilon, self.sinkhorn_steps)
            here = dist.get_rank() if self.world_size > 1 else 0
            assignment = assignment[here * len(assigned) :][: len(assigned)]
        return -(assignment * (predicting * self.prototype_scale).log_softmax(dim=1)).sum(dim=1).mean()


def sinkhorn(logits: Tensor, epsilon: float, steps: int) -> Tensor:
    """Assignment of B samples to K prototypes, near exp(logits / epsilon), that spreads them evenly.

    Each step gives all prototypes the same total, then all samples a total of one.

    Shape:
        logits: [B, K].
        Returns [B, K]; each row sums to one.
    """
    log_assignment = logits / epsilon
    for _ in range(steps):
        log_assignment = log_assignment.log_softmax(dim=0).log_softmax(dim=1)
    return log_assignment.exp()


class CrossAttention(nn.Module):
    """Attention with one head from one sequence to another one, layer-normalised before and projected back after.

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
        """[B, N, D] from queries [B, N, D] and context [B, M, D], of which `context_mask`, bool [B, M], counts.

        Where no context counts, the output is 0.
        """
        queries, context = F.layer_norm(queries, queries.shape[-1:]), F.layer_norm(context, context.shape[-1:])
        usable = context_mask | ~context_mask.any(dim=1, keepdim=True)
        logits = self.query(queries) @ self.key(context).transpose(1, 2) / self.query.out_features**0.5
        weights = logits.masked_fill(~usable[:, None], -torch.inf).softmax(dim=-1)
        # All zero where nothing counts: nothing reaches the gradient either.
        weights = weights.masked_fill(~context_mask[:, None], 0)
        return self.output(weights @ self.value(context))


class MgcaHeads(nn.Module):
    """What MGCA learns beyond the two encoders: cross-attention in both directions, and the prototypes.

    Computed in the parameters' dtype, float32, whatever the autocast.

    Args:
        embed_dim: D of all features.
        head_dim: of the one attention head; 128 in the SPARC paper.
        prototypes: K; 500 in the SPARC paper.
    """

    def __init__(self, embed_dim: int, head_dim: int = 128, prototypes: int = 500) -> None:
        super().__init__()
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
        """What `MgcaLoss` takes beyond the model's outputs, which are the arguments here.

        Args:
            image_features: [B, D], L2-normalised.
            text_features: [B, D], L2-normalised.
            patch_features: [B, P, D].
            token_features: [B, L, D].
            token_mask: bool [B, L], True for the tokens that count.
            patch_mask: bool [B, P] or None, False for padding patches.

        Returns:
            attended_patches [B, L, D], what each token gathers from the patches; attended_tokens [B, P, D], what each
            patch gathers from the tokens that count; image_prototype_logits and text_prototype_logits [B, K], cosines.

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
        usable_patches = check_masks("MgcaHeads", patch_features, token_features, token_mask, patch_mask, None)
        patch_features = zero_where_masked(patch_features, patch_mask)
        token_features = zero_where_masked(token_features, token_mask)
        patch_mask = usable_patches
        dtype = self.prototypes.dtype
        with autocast_disabled(patch_features.device):
            patches, tokens = patch_features.to(dtype), token_features.to(dtype)
            prototypes = F.normalize(self.prototypes, dim=-1)
            return {
                "attended_patches": self.tokens_to_patches(tokens, patches, patch_mask),
                "attended_tokens": self.patches_to_tokens(patches, tokens, token_mask),
                "image_prototype_logits": image_features.to(dtype) @ prototypes.T,
                "text_prototype_logits": text_features.to(dtype) @ prototypes.T,
            }
