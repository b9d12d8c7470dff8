"""Random batches with SPARC's settings for the property tests."""

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from torch import Tensor

from sparc_loss.functional import ALIGNMENTS, REDUCTIONS, alignment_weights, fine_grained_loss, token_patch_similarity
from sparc_loss.testing import LocalBatch, local_batches


@dataclass(frozen=True)
class Batch(LocalBatch):
    """The arguments of `fine_grained_loss`, in float64."""

    logit_scale: float = 1.0
    threshold: float | None = None
    alignment: str = "sparse"
    reduction: str = "token"

    def loss(self) -> Tensor:
        return fine_grained_loss(**vars(self))

    def weights(self) -> Tensor:
        similarity = token_patch_similarity(self.token_features, self.patch_features)
        return alignment_weights(similarity, self.threshold, self.alignment, self.patch_mask, self.region_mask)


def settings() -> st.SearchStrategy[dict[str, Any]]:
    """All methods and reductions."""
    return st.fixed_dictionaries(
        {
            "logit_scale": st.sampled_from([1.0, 10.0, 100.0]),
            "threshold": st.sampled_from([None, None, 0.0, 0.3, 0.5, 1.0]),
            "alignment": st.sampled_from(ALIGNMENTS),
            "reduction": st.sampled_from(REDUCTIONS),
        }
    )


@st.composite
def batches(draw: st.DrawFn, masks: bool = True, **fixed: object) -> Batch:
    """Sizes 1 to 9, all methods and reductions, masks with holes and empty rows."""
    local = draw(local_batches(patch_mask=masks, region_mask=masks))
    return Batch(**{**vars(local), **draw(settings()), **fixed})
