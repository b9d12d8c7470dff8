"""FLAIR: every caption pools the patches of every image by learned attention (CVPR 2025, arXiv 2412.03561)."""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from sparc_loss._arithmetic import autocast_disabled, l2_normalised
from sparc_loss._checks import check_features, check_whole_number
from sparc_loss.losses.all_pairs import all_pairs_scores
from sparc_loss.losses.distributed import gathered
from sparc_loss.losses.objective import GlobalLossArguments, Objective
from sparc_loss.losses.outputs import ModelOutputs, local_outputs_without_regions

if TYPE_CHECKING:
    from typing_extensions import Unpack

FURTHER_INPUTS = ("text_conditioned_cosines", "text_conditioned_bias")


class FlairLoss(Objective):
    """The global loss, and a sigmoid loss on the cosine of each caption with each image's patches pooled for it.

    The text-conditioned term is that of FLAIR's code (github.com/ExplainableML/flair, src/flair/loss.py) with one
    caption per image, which is what open_clip's data has: the sum over the captions of log(1 + exp(-z * (logit_scale *
    cosine + bias))), z = 1 for the own caption and -1 for the others, averaged over images. FLAIR averages it with a
    sigmoid loss of the global embeddings; pass open_clip's SigLipLoss (`--siglip`) as the global loss for the same.
    Tokens are not used; a caption without tokens still has its global embedding. An image without a valid patch adds
    nothing.

    The attention and the bias are learned, so they belong to the model, which open_clip optimises. This loss has no
    parameters and takes the outputs of `FlairHeads`. FLAIR shares the bias with its global loss; here it is the heads'
    own, because a CLIP model has none.

    Args:
        global_weight, fine_grained_weight: of the two terms; 0.5 each as in FLAIR's code.
        fine_grained_scale, global_loss, local_loss, gather_with_grad, cache_labels, rank, world_size: see `Objective`.

    Raises:
        TypeError, ValueError, ImportError: as `Objective`.

    Example:
        >>> heads = FlairHeads(embed_dim=512)                            # its parameters go to the optimizer
        >>> outputs = model(images, texts)                               # doctest: +SKIP
        >>> total = FlairLoss()(**outputs, **heads(**outputs))           # doctest: +SKIP
    """

    further_inputs = FURTHER_INPUTS

    def __init__(
        self,
        global_weight: float = 0.5,
        fine_grained_weight: float = 0.5,
        fine_grained_scale: float | None = None,
        **shared: "Unpack[GlobalLossArguments]",
    ) -> None:
        super().__init__(global_weight, fine_grained_weight, fine_grained_scale, **shared)

    def fine_grained_term(self, outputs: ModelOutputs) -> Tensor:
        """The text-conditioned sigmoid loss of this rank's images with the captions of all ranks, a scalar."""
        cosines, bias = (outputs.further[name] for name in FURTHER_INPUTS)
        check_features("b p d, b c", patch_features=outputs.patch_features, text_conditioned_cosines=cosines)
        captions = len(cosines) * self.world_size
        if cosines.shape[1] != captions:
            raise ValueError(
                f"text_conditioned_cosines has shape {list(cosines.shape)}; expected [{len(cosines)}, {captions}], "
                f"the captions of {self.world_size} rank(s): FlairHeads and FlairLoss need the same world_size"
            )
        _, patch_mask, _, _ = outputs.without_regions("FlairLoss")
        rank = dist.get_rank() if self.world_size > 1 else 0
        own = torch.eye(captions, dtype=torch.bool, device=cosines.device)[rank * len(cosines) :][: len(cosines)]
        logits = cosines * outputs.logit_scale + bias
        losses = -F.logsigmoid(torch.where(own, logits, -logits)).sum(dim=1)
        return losses.where(patch_mask.any(dim=1), 0).mean()


class FlairHeads(nn.Module):
    """The parameters of FLAIR beside the two encoders: the attention of captions to patches, and a bias.

    The computation is in the dtype of the parameters, float32, whatever the autocast. Its parameters but `bias` are
    named as in FLAIR's `visual_proj`.

    Cost for B pairs on each of W ranks: as `sparc_loss.losses.all_pairs` with one token per caption. Every rank
    receives the global text embeddings of all ranks, W * B * D numbers. Patches are not exchanged. B must be the same
    on each rank, and every rank must call it at every step.

    Args:
        embed_dim: D of all features.
        heads: number of attention heads, which divides D; 8 in FLAIR.
        bias: at the start; -10 in FLAIR, as in SigLIP.
        world_size: number of ranks.

    Raises:
        TypeError, ValueError: a number of heads that is not a whole number of at least 1 or does not divide D.
    """

    def __init__(self, embed_dim: int, heads: int = 8, bias: float = -10.0, world_size: int = 1) -> None:
        super().__init__()
        check_whole_number("heads", heads, 1)
        if embed_dim % heads:
            raise ValueError(f"heads is {heads} with embed_dim {embed_dim}; expected a divisor of embed_dim")
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(embed_dim) for _ in range(3))
        self.attn = nn.MultiheadAttention(embed_dim, heads, batch_first=True, add_zero_attn=True)
        self.bias = nn.Parameter(torch.tensor(float(bias)))
        self.world_size = world_size

    def forward(
        self,
        text_features: Tensor,
        patch_features: Tensor,
        token_features: Tensor,
        token_mask: Tensor,
        patch_mask: Tensor | None = None,
        **_: Tensor,
    ) -> dict[str, Tensor]:
        """The inputs of `FlairLoss` beyond the model's outputs, which are the arguments here.

        Args:
            text_features: [B, D], L2-normalised.
            patch_features: [B, P, D].
            token_features: [B, L, D]; not used.
            token_mask: bool [B, L]; not used.
            patch_mask: bool [B, P] or None, False for padding patches.

        Returns:
            text_conditioned_cosines [B, W * B], of this rank's images and the captions of all ranks in their order;
            text_conditioned_bias, a scalar.

        Raises:
            TypeError: features not floating point, a mask not bool.
            ValueError: ranks, sizes or devices that disagree.
        """
        check_features("b d, b p d", text_features=text_features, patch_features=patch_features)
        masks = token_mask, patch_mask, None
        patches, patch_mask = local_outputs_without_regions("FlairHeads", patch_features, token_features, *masks)[:2]
        dtype = self.bias.dtype
        with autocast_disabled(patches.device):
            patches, texts = patches.to(dtype), text_features.to(dtype)
            to_query, to_key, to_value = self.attn.in_proj_weight.chunk(3)
            query_bias, key_bias, value_bias = self.attn.in_proj_bias.chunk(3)
            queries = F.linear(self.ln_q(texts), to_query, query_bias)
            keys = F.linear(self.ln_k(patches), to_key, key_bias)
            values = F.linear(self.ln_v(patches), to_value, value_bias)
            captions = gathered(torch.stack([queries, l2_normalised(texts).to(dtype)], dim=1), self.world_size)
            # all_pairs_scores takes tokens: each caption has one, its query and its embedding.
            captions = rearrange(captions, "c two d -> c 1 (two d)")
            every_caption = torch.ones(captions.shape[:2], dtype=torch.bool, device=captions.device)
            keys_and_values = torch.cat([keys, values], dim=-1)
            attention = self.attn.num_heads * (patches.shape[1] + 1)  # numbers of an image and a caption
            scores = all_pairs_scores(self._cosines, keys_and_values, patch_mask, captions, every_caption, attention)
        return {"text_conditioned_cosines": scores[0], "text_conditioned_bias": self.bias}

    def _cosines(self, keys_and_values: Tensor, patch_mask: Tensor, captions: Tensor, _: Tensor) -> Tensor:
        """Cosines [1, I, C] from keys and values [I, P, 2D] of the patches, and queries and embeddings [C, 1, 2D]."""
        heads = self.attn.num_heads
        keys, values = rearrange(keys_and_values, "i p (two h d) -> two i h p d", two=2, h=heads)
        queries, texts = rearrange(captions, "c 1 (two d) -> two c d", two=2)
        queries = rearrange(queries, "c (h d) -> h c d", h=heads) / keys.shape[-1] ** 0.5
        logits = (queries @ keys.transpose(-1, -2)).masked_fill(~patch_mask[:, None, None], -torch.inf)
        # The patch of zeros that FLAIR adds takes its share of the softmax, and adds nothing to the sum.
        weights = F.pad(logits, (0, 1)).softmax(dim=-1)[..., :-1]
        pooled = rearrange(weights @ values, "i h c d -> i c (h d)")
        cosines: Tensor = (l2_normalised(self.attn.out_proj(pooled)) * texts).sum(dim=-1)
        return cosines[None]
