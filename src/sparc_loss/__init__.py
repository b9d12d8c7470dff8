"""SPARC's fine-grained image-text loss for open_clip (arXiv 2401.09865)."""

__version__ = "0.1.0"
