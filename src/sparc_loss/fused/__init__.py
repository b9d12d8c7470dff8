"""The losses of `sparc_loss.functional` with the same values and gradients, at lower cost.

`functional` is the reference: where this package differs from it, this package is wrong. One difference is meant:
where patches tie at a threshold of 1, highest_patch_by_image.py leaves out the gradient by which they tie.

- `fine_grained.py`: the fine-grained loss and the derivation of its gradient.
- `image_contrast.py`: the contrast with other images, and the derivation of its gradient.
- `highest_patch.py`: the same where each token has its highest patch alone, on a CPU.
- `highest_patch_by_image.py`: that on other devices.
- `contrast.py`: the cross-entropies of both, by captions and by images.
- `alignment.py`: Eqs. 2 to 5 in place, with their gradient; both losses use it.
- `groups.py`: batches split into groups of captions of similar length.
- `function.py`: the checks and the `torch.autograd.Function` of both losses.
"""

from sparc_loss.fused.fine_grained import fine_grained_loss
from sparc_loss.fused.function import is_transformed
from sparc_loss.fused.image_contrast import image_contrastive_loss

__all__ = ["fine_grained_loss", "image_contrastive_loss", "is_transformed"]
