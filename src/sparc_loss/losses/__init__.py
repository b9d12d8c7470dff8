"""Training objectives, one per file, each with ClipLoss's constructor arguments."""

from sparc_loss.losses.sparc import SparcLoss

__all__ = ["SparcLoss"]
