"""Captioning by a frozen backbone: a small decoder that looks at the patch embeddings of any open_clip model."""
