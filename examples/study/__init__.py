"""Every objective on the same scenes, the same model and the same measures: the comparison anyone can rerun."""
