"""A causal decoder with gated cross-attention on patch embeddings, as Flamingo's (Alayrac et al., arXiv 2204.14198).

The layers are those of transformers' Mllama: after each layer of cross-attention, whose gates begin at 0 (the decoder
first learns the language alone), comes one of causal self-attention. No weights are downloaded.
"""

import torch
from torch import Tensor, nn
from transformers import MllamaForCausalLM
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from .vocabulary import END, PAD, START, UNKNOWN


class Captioner(nn.Module):
    """Captions from patch embeddings.

    Args:
        patch_width: D of the patch embeddings.
        words: of the vocabulary.
        length: words of the longest caption.
        width: of the decoder.
        pairs: of layers, one of cross-attention and one of self-attention each.
        heads: of attention.
    """

    def __init__(
        self, patch_width: int, words: int, length: int, width: int = 128, pairs: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        self.length = length
        self.patches = nn.Sequential(nn.LayerNorm(patch_width), nn.Linear(patch_width, width))
        self.decoder = MllamaForCausalLM(
            MllamaTextConfig(
                vocab_size=words,
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=2 * pairs,
                cross_attention_layers=list(range(0, 2 * pairs, 2)),
                num_attention_heads=heads,
                num_key_value_heads=heads,
                max_position_embeddings=length + 2,
                pad_token_id=PAD,
                bos_token_id=START,
                eos_token_id=END,
                # With "sdpa", transformers 5.24 takes cross-attention without a mask for causal: word i would see the
                # first i patches only.
                attn_implementation="eager",
            )
        )

    def forward(self, patches: Tensor, ids: Tensor) -> Tensor:
        """The mean cross-entropy of the words after the first.

        Args:
            patches: [B, P, D].
            ids: int64 [B, L] of `Vocabulary.encode`.
        """
        return self.decoder(
            input_ids=ids,
            attention_mask=ids != PAD,
            cross_attention_states=self.patches(patches),
            labels=ids.masked_fill(ids == PAD, -100),
            use_cache=False,
        ).loss

    @torch.no_grad()
    def generate(self, patches: Tensor, beams: int = 1) -> Tensor:
        """Captions of [B, P, D], int64 [B, L]; one beam is greedy."""
        return self.decoder.generate(
            input_ids=torch.full((len(patches), 1), START, device=patches.device),
            attention_mask=torch.ones(len(patches), 1, dtype=torch.long, device=patches.device),
            cross_attention_states=self.patches(patches),
            max_new_tokens=self.length + 1,
            num_beams=beams,
            do_sample=False,
            suppress_tokens=[PAD, START, UNKNOWN],
            # The cache of transformers 5.24 takes the patches for new ones at every word.
            use_cache=False,
        )
