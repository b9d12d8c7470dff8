"""The embedded data: small scenes of handwritten digits and drawn shapes with captions, and a model of their size."""
