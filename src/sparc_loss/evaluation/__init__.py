"""Measures of image-text models: functions on tensors, one measure per file, each with its chance level."""

from sparc_loss.evaluation.pointing import PointingGame, box_masks, pointing_game
from sparc_loss.evaluation.retrieval import Recall, recall_at_k, recall_chance
from sparc_loss.evaluation.segmentation import (
    BACKGROUND,
    Segmentation,
    intersection_and_union,
    mean_iou,
    random_intersection_and_union,
    segment,
)

__all__ = [
    "BACKGROUND",
    "PointingGame",
    "Recall",
    "Segmentation",
    "box_masks",
    "intersection_and_union",
    "mean_iou",
    "pointing_game",
    "random_intersection_and_union",
    "recall_at_k",
    "recall_chance",
    "segment",
]
