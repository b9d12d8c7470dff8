"""Boxes and masks in training: which patches a token may use."""

from sparc_loss.regions.mask import REGION_WORDS, RegionWords, region_mask

__all__ = ["REGION_WORDS", "RegionWords", "region_mask"]
