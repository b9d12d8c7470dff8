"""Measures of image-text models: functions on tensors, one measure per file, each with its chance level.

`sparc-loss evaluate` (command.py) takes them all of an open_clip model; importing this package needs no open_clip.
"""

from sparc_loss.evaluation.classification import top_k_accuracy
from sparc_loss.evaluation.faithfulness import KPrecision, k_precision, text_k_precision
from sparc_loss.evaluation.hard_negatives import HARD_NEGATIVE_CHANCE, hard_negative_accuracy, swap_words
from sparc_loss.evaluation.image_dependence import (
    ImageDependence,
    TokenMatching,
    image_dependence,
    mean_image_dependence,
)
from sparc_loss.evaluation.pointing import PointingGame, box_masks, pointing_game
from sparc_loss.evaluation.retrieval import Recall, nearest_captions, recall_at_k, recall_chance
from sparc_loss.evaluation.segmentation import (
    BACKGROUND,
    Segmentation,
    intersection_and_union,
    majority_segmentation,
    mean_iou,
    random_intersection_and_union,
    segment,
)

__all__ = [
    "BACKGROUND",
    "HARD_NEGATIVE_CHANCE",
    "ImageDependence",
    "KPrecision",
    "PointingGame",
    "Recall",
    "Segmentation",
    "TokenMatching",
    "box_masks",
    "hard_negative_accuracy",
    "image_dependence",
    "intersection_and_union",
    "k_precision",
    "majority_segmentation",
    "mean_image_dependence",
    "mean_iou",
    "nearest_captions",
    "pointing_game",
    "random_intersection_and_union",
    "recall_at_k",
    "recall_chance",
    "segment",
    "swap_words",
    "text_k_precision",
    "top_k_accuracy",
]
