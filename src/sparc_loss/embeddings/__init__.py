"""Patch and token embeddings out of open_clip models. Importing this package imports open_clip."""

from sparc_loss.embeddings.surface import restore, surface_embeddings

__all__ = ["restore", "surface_embeddings"]
