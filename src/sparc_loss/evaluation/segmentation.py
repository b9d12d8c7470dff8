"""Zero-shot segmentation: patch embeddings against class-text embeddings, as SPARC's authors measure it.

For each image: the cosine of every patch with the text of every class present in it, upsampled to the pixels, the best
class for each pixel, and the mean intersection over union of the classes. Intersections and unions are summed over
the data set before they are divided, as PASCAL VOC does it:

    totals = 0
    for each image:
        labels, scores = segment(patch_features, class_features, grid, target.shape, present=present)
        totals = totals + torch.stack(intersection_and_union(labels, target, num_classes=C))
    mean_iou(*totals)

The paper averages over foreground classes and predicts no background, so background pixels count against every class.
With `background_threshold`, pixels that resemble no class are background, which is then a class like the others. With
`ignore=BACKGROUND`, background pixels are left out: this measures how well the classes are separated. The score of
`majority_segmentation` is about the best that a grid of patches allows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sparc_loss._checks import check_features
from sparc_loss.evaluation.patch_grid import check_extent, nearest_patches

# Label of pixels of no class. It indexes the last row of intersections and unions, as -1 does.
BACKGROUND = -1


class Segmentation(NamedTuple):
    """The class of each pixel and how sure it is.

    Attributes:
        labels: int64 [H, W], rows of the class features, or BACKGROUND.
        scores: float32 [H, W], the cosine with the best class; `labels.masked_fill(scores < t, BACKGROUND)` is
            the segmentation with threshold t.
    """

    labels: Tensor
    scores: Tensor


def segment(
    patch_features: Tensor,
    class_features: Tensor,
    grid: tuple[int, int],
    size: tuple[int, int],
    *,
    present: Sequence[int] | Tensor | None = None,
    background_threshold: float | None = None,
    extent: tuple[float, float] = (1.0, 1.0),
) -> Segmentation:
    """Give each pixel of one image the class whose text is most similar to it.

    Args:
        patch_features: floating point [P, D], row by row, normalised or not.
        class_features: floating point [C, D], normalised or not.
        grid: height and width of the patch grid; their product is P.
        size: height and width of the image in pixels.
        present: the rows of `class_features` to choose from (the paper: the classes present); None is all.
        background_threshold: a pixel whose best cosine is lower is background; None is no background.
        extent: the share of the image's height and width that the grid covers, as in `pointing_game`; pixels beyond
            have the cosines of the nearest patch.

    Raises:
        TypeError: features that are not floating-point tensors, an extent that is not a number.
        ValueError: shapes that disagree, values that are not finite, `present` empty or out of range, an extent that
            is not above 0.
    """
    check_features("p d, c d", patch_features=patch_features, class_features=class_features)
    height, width = grid
    if height * width != len(patch_features):
        raise ValueError(
            f"grid is {height} x {width} = {height * width}; expected patch_features' P = {len(patch_features)}"
        )
    for name, features in (("patch_features", patch_features), ("class_features", class_features)):
        if not features.isfinite().all():
            raise ValueError(f"{name} has values that are not finite; expected finite ones")
    rows = _present(present, len(class_features), class_features.device)

    classes = F.normalize(class_features[rows].float(), dim=-1)
    cosine = F.normalize(patch_features.float(), dim=-1) @ classes.T
    cosine = rearrange(cosine, "(h w) c -> 1 c h w", h=height)
    scores, best = upsample(cosine, size, extent)[0].max(dim=0)
    labels = rows[best]
    if background_threshold is not None:
        labels = labels.masked_fill(scores < background_threshold, BACKGROUND)
    return Segmentation(labels, scores)


def upsample(maps: Tensor, size: tuple[int, int], extent: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Maps of patches over the pixels of an image, bilinear.

    Args:
        maps: [1, C, h, w].
        size: height and width of the image in pixels.
        extent: the share of the image's height and width that the maps cover; beyond, the outermost values go on.

    Returns:
        [1, C, H, W].
    """
    if tuple(extent) == (1, 1):
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    for share in extent:
        check_extent(share)
    # From -1 to 1 over the grid. Beyond its outermost centres, the outermost values go on.
    y, x = (
        (2 * torch.arange(pixels, device=maps.device, dtype=maps.dtype) + 1) / (pixels * share) - 1
        for pixels, share in zip(size, extent, strict=True)
    )
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    places = torch.stack((columns, rows), dim=-1).unsqueeze(0)
    return F.grid_sample(maps, places, mode="bilinear", padding_mode="border", align_corners=False)


def intersection_and_union(
    labels: Tensor, target: Tensor, num_classes: int, ignore: int | None = None
) -> tuple[Tensor, Tensor]:
    """Pixels in both, and pixels in either, of prediction and ground truth, per class. Sum them over the images.

    Args:
        labels: int64 [...], 0 to num_classes - 1 or BACKGROUND.
        target: int64 [...], with the same values, or `ignore`.
        num_classes: C.
        ignore: target value of pixels left out of everything, such as VOC's 255.

    Returns:
        Intersection and union, int64 [C + 1]; the last is background.

    Raises:
        TypeError: labels or target of another dtype.
        ValueError: shapes that disagree, a label out of range.
    """
    _check_labels("labels", labels)
    _check_labels("target", target)
    if labels.shape != target.shape:
        raise ValueError(f"labels has shape {list(labels.shape)}, target {list(target.shape)}; expected the same")
    if ignore is not None:
        labels, target = labels[target != ignore], target[target != ignore]
    predicted, true = (_count(name, values, num_classes) for name, values in (("labels", labels), ("target", target)))
    intersection = _count("labels", labels[labels == target], num_classes)
    return intersection, predicted + true - intersection


def majority_segmentation(
    target: Tensor,
    grid: tuple[int, int],
    num_classes: int,
    *,
    background: bool = False,
    ignore: int | None = None,
    extent: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Give all pixels of a patch the class that most of them have: about the best that one label per patch can do.

    Not a strict bound: `segment` interpolates between patches, and so may draw finer borders.

    Args:
        target: int64 [H, W], 0 to num_classes - 1, BACKGROUND or `ignore`.
        grid: height and width of the patch grid.
        num_classes: C.
        background: background is a label too. If not, a patch without a pixel of any class takes the image's most
            frequent one, whose union it hurts least.
        ignore: as in `intersection_and_union`.
        extent: the share of the image's height and width that the grid covers, as in `pointing_game`; pixels beyond
            belong to the nearest patch.

    Returns:
        Labels, int64 [H, W]; of classes as frequent, the first. BACKGROUND where there is no class at all.

    Raises:
        TypeError: target of another dtype, an extent that is not a number.
        ValueError: target of another rank, a label out of range, a grid finer than the pixels, an extent that is not
            above 0.
    """
    _check_labels("target", target)
    if target.ndim != 2 or not (0 < grid[0] <= target.shape[0] and 0 < grid[1] <= target.shape[1]):
        raise ValueError(
            f"target has shape {list(target.shape)}, grid is {grid[0]} x {grid[1]}; expected [H, W], no finer a grid"
        )
    rows, columns = (
        nearest_patches(pixels, patches, share).to(target.device)
        for pixels, patches, share in zip(target.shape, grid, extent, strict=True)
    )
    patch = rows[:, None] * grid[1] + columns
    kept = torch.ones_like(target, dtype=torch.bool) if ignore is None else target != ignore
    _count("target", target[kept], num_classes)  # refuses labels out of range
    # Classes first, background last: row-major bins of (patch, label).
    bins = patch[kept] * (num_classes + 1) + target[kept] % (num_classes + 1)
    size = grid[0] * grid[1] * (num_classes + 1)
    pixels = torch.bincount(bins, minlength=size).view(-1, num_classes + 1)
    if not background:
        pixels = pixels[:, :-1]
        frequency = pixels.sum(dim=0)
        if num_classes == 0 or not frequency.any():
            return torch.full_like(target, BACKGROUND)
        pixels = pixels.where(pixels.any(dim=1, keepdim=True), frequency)
    labels = pixels.argmax(dim=1)
    return labels.masked_fill(labels == num_classes, BACKGROUND)[patch]


def random_intersection_and_union(
    target: Tensor,
    num_classes: int,
    present: Sequence[int] | Tensor | None = None,
    *,
    background: bool = False,
    ignore: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Expected intersection and union if every pixel's label is drawn at random: the chance level of `mean_iou`.

    Args:
        target: int64 [...], 0 to num_classes - 1, BACKGROUND or `ignore`.
        num_classes: C.
        present: the classes to draw from, evenly; None is all.
        background: draw background as well, as likely as each class.
        ignore: as in `intersection_and_union`.

    Returns:
        Intersection and union, float64 [C + 1]; the last is background.

    Raises:
        TypeError: target of another dtype.
        ValueError: a label out of range, `present` empty or out of range.
    """
    _check_labels("target", target)
    if ignore is not None:
        target = target[target != ignore]
    true = _count("target", target, num_classes).double()
    drawn = torch.zeros_like(true)
    drawn[_present(present, num_classes, target.device)] = 1
    drawn[BACKGROUND] = float(background)
    share = drawn / drawn.sum()
    intersection = share * true
    return intersection, share * true.sum() + true - intersection


def mean_iou(intersection: Tensor, union: Tensor, *, background: bool = False) -> float:
    """Mean intersection over union of the classes that occur in prediction or ground truth; NaN if none does.

    Args:
        intersection: [C + 1], summed over the images; the last is background.
        union: [C + 1], in the same order.
        background: count background as a class.

    Raises:
        ValueError: shapes that disagree.
    """
    if intersection.ndim != 1 or intersection.shape != union.shape:
        raise ValueError(
            f"intersection has shape {list(intersection.shape)}, union {list(union.shape)}; expected both [C + 1]"
        )
    if not background:
        intersection, union = intersection[:-1], union[:-1]
    occurs = union > 0
    return (intersection[occurs].double() / union[occurs].double()).mean().item()


def _present(present: Sequence[int] | Tensor | None, num_classes: int, device: torch.device) -> Tensor:
    """The classes to choose from, int64; all where `present` is None."""
    rows = torch.as_tensor(range(num_classes) if present is None else present, dtype=torch.long, device=device)
    if rows.numel() == 0 or rows.min() < 0 or rows.max() >= num_classes:
        raise ValueError(f"present is {rows.tolist()}; expected one or more classes from 0 to {num_classes - 1}")
    return rows


def _check_labels(name: str, labels: Tensor) -> None:
    if not isinstance(labels, Tensor) or labels.dtype != torch.long:
        found = f"dtype {labels.dtype}" if isinstance(labels, Tensor) else f"type {type(labels).__name__}"
        raise TypeError(f"{name} has {found}; expected a tensor of torch.int64")


def _count(name: str, labels: Tensor, num_classes: int) -> Tensor:
    """Pixels per class, int64 [C + 1], background last."""
    outside = (labels < BACKGROUND) | (labels >= num_classes)
    if outside.any():
        raise ValueError(
            f"{name} has the label {labels[outside][0].item()}; "
            f"expected 0 to {num_classes - 1}, or {BACKGROUND} for background"
        )
    # Background's -1 becomes the last bin.
    return torch.bincount(labels.flatten() % (num_classes + 1), minlength=num_classes + 1)
