"""Random batches for the property tests."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from sparc_loss.functional import ALIGNMENTS, REDUCTIONS, alignment_weights, fine_grained_loss, token_patch_similarity


@dataclass(frozen=True)
class Batch:
    """The arguments of `fine_grained_loss`, in float64."""

    patch_features: Tensor
    token_features: Tensor
    token_mask: Tensor
    logit_scale: float
    threshold: float | None = None
    alignment: str = "sparse"
    reduction: str = "token"
    patch_mask: Tensor | None = None
    region_mask: Tensor | None = None

    def loss(self) -> Tensor:
        return fine_grained_loss(**vars(self))

    def weights(self) -> Tensor:
        similarity = token_patch_similarity(self.token_features, self.patch_features)
        return alignment_weights(similarity, self.threshold, self.alignment, self.patch_mask, self.region_mask)

    def but(self, **changes: object) -> "Batch":
        return replace(self, **changes)

    def with_gradients(self) -> "Batch":
        return self.but(
            patch_features=self.patch_features.clone().requires_grad_(),
            token_features=self.token_features.clone().requires_grad_(),
        )


@st.composite
def batches(draw: st.DrawFn, masks: bool = True, **fixed: object) -> Batch:
    """Sizes 1 to 9, all methods and reductions, masks with holes and empty rows.

    Features are whole numbers half the time: then equal similarities, zero vectors and values right at the threshold
    are common. Whole patches are not negative, so that no grouped embedding is zero but for rounding: the cosine with
    such a one is anything.
    """
    size = st.integers(1, 9)
    b, p, length, d = draw(size), draw(size), draw(size), draw(size)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    whole = draw(st.booleans())

    def features(*shape: int, lowest: int) -> Tensor:
        return torch.from_numpy(rng.integers(lowest, 3, shape).astype(float) if whole else rng.normal(size=shape))

    def mask(*shape: int) -> Tensor:
        return torch.from_numpy(rng.random(shape) < draw(st.sampled_from([0.5, 0.8, 1.0])))

    batch = Batch(
        patch_features=features(b, p, d, lowest=0),
        token_features=features(b, length, d, lowest=-2),
        token_mask=mask(b, length),
        logit_scale=draw(st.sampled_from([1.0, 10.0, 100.0])),
        threshold=draw(st.sampled_from([None, None, 0.0, 0.3, 0.5, 1.0])),
        alignment=draw(st.sampled_from(ALIGNMENTS)),
        reduction=draw(st.sampled_from(REDUCTIONS)),
        patch_mask=mask(b, p) if masks and draw(st.booleans()) else None,
        region_mask=mask(b, length, p) if masks and draw(st.booleans()) else None,
    )
    if rng.random() < 0.3:
        batch.token_mask[0] = False
    return batch.but(**fixed)
