"""Measures and figures of validation pairs between epochs. They never end a run or change the training."""
