"""Old name of `sparc_loss.fused.image_contrast`."""

import warnings

from sparc_loss.fused import image_contrastive_loss

__all__ = ["image_contrastive_loss"]

warnings.warn(f"{__name__} is now sparc_loss.fused", DeprecationWarning, stacklevel=2)
