"""Hooks into open_clip_train: what is replaced for a run in each major version of open_clip."""
