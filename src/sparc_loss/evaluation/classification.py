"""Zero-shot classification: is an image's class among the k classes whose prompts are nearest?"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparc_loss._checks import check_features
from sparc_loss._nearest import TIE
from sparc_loss.evaluation.retrieval import check_k, queries_at_a_time


def top_k_accuracy(image_features: Tensor, class_features: Tensor, target: Tensor, k: int = 1) -> float:
    """Share of the images whose class is among the k nearest by cosine similarity.

    Of classes that tie, the first is nearest, as argmax has it: ImageNet has two classes "missile" and two
    "sunglasses". Chance is `recall_chance(C, k)`, k / C.

    Args:
        image_features: floating point [N, D], normalised or not.
        class_features: floating point [C, D], one per class: `open_clip.build_zero_shot_classifier(...).T` averages
            the prompts of each.
        target: int64 [N], the class of each image.
        k: 1 to C.

    Raises:
        TypeError: features that are not floating-point tensors, k that is not an int, a target not of int64.
        ValueError: shapes or devices that disagree, values that are not finite, no image, k outside 1 to C, a class
            out of range.
    """
    check_features("n d, c d", image_features=image_features, class_features=class_features)
    check_k(k, len(class_features))
    for name, features in (("image_features", image_features), ("class_features", class_features)):
        if not features.isfinite().all():
            raise ValueError(f"{name} has values that are not finite; expected finite ones")
    if not isinstance(target, Tensor) or target.dtype != torch.long:
        found = f"dtype {target.dtype}" if isinstance(target, Tensor) else f"type {type(target).__name__}"
        raise TypeError(f"target has {found}; expected a tensor of torch.int64")
    if target.shape != image_features.shape[:1] or len(target) == 0:
        raise ValueError(
            f"target has shape {list(target.shape)}; expected [N] = [{len(image_features)}], N at least 1"
        )
    if target.min() < 0 or target.max() >= len(class_features):
        outside = target[(target < 0) | (target >= len(class_features))][0].item()
        raise ValueError(f"target has the class {outside}; expected 0 to {len(class_features) - 1}")

    images, classes = F.normalize(image_features.float(), dim=-1), F.normalize(class_features.float(), dim=-1)
    hits, chunk = 0, queries_at_a_time(len(classes))
    order = torch.arange(len(classes), device=classes.device)
    for start in range(0, len(images), chunk):
        cosine = images[start : start + chunk] @ classes.T
        of_class = target[start : start + chunk].unsqueeze(1)
        right = cosine.gather(1, of_class)
        ties_before = ((cosine - right).abs() <= TIE) & (order < of_class)
        before = (cosine > right + TIE) | ties_before
        hits += int((before.sum(dim=1) < k).sum())
    return hits / len(images)
