"""Open-vocabulary detection: OWL-ViT's heads on the patch embeddings of any open_clip model."""
