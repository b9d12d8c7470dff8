"""open_clip's transforms of images, applied to the boxes of an image as well.

torchvision's transforms v2 do the geometry: each step of open_clip's transform that moves pixels is replaced by the
step of the same name in v2, which draws the same random numbers and gives the same image.
"""

from typing import Any

import torch
from open_clip.transform import CenterCropOrPad, ResizeKeepRatio
from torchvision import transforms as v1
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes

# Steps that leave every pixel where it is, by the names of their classes or functions: open_clip's and torchvision's.
IN_PLACE = (
    "MaybeConvertMode",
    "MaybeToTensor",
    "_convert_to_rgb",
    "color_jitter",
    "gray_scale",
    "ColorJitter",
    "Grayscale",
    "Normalize",
    "RandomGrayscale",
    "ToTensor",
)


class JointTransform:
    """A transform of images as a transform of an image and its boxes.

    Args:
        transform: a `torchvision.transforms.Compose`, as `open_clip.create_model_and_transforms` returns it.

    Raises:
        ValueError: a transform with a step that is not known, by name; such as those of timm (`--aug-cfg
            use_timm=True`), which have no counterpart for boxes.
    """

    def __init__(self, transform: Any) -> None:
        steps = getattr(transform, "transforms", None)
        if not isinstance(transform, (v1.Compose, v2.Compose)) or steps is None:
            raise ValueError(
                f"the image transform is a {type(transform).__name__}; expected torchvision's Compose, as open_clip "
                "makes it without timm and NaFlex"
            )
        self.steps = [(step, _for_boxes(step)) for step in steps]

    def __call__(self, image: Any, boxes: BoundingBoxes) -> tuple[Any, BoundingBoxes]:
        """The transformed image, and where its boxes are then; a box that was cropped away has no area."""
        for step, joint in self.steps:
            if joint is None:
                image = step(image)
            else:
                image, boxes = joint(image, boxes)
        return image, boxes


class _Centred:
    """A crop at the centre, or a margin of the step's colour around it."""

    def __init__(self, step: CenterCropOrPad) -> None:
        self.step = step

    def __call__(self, image: Any, boxes: BoundingBoxes) -> tuple[Any, BoundingBoxes]:
        return self.step(image), v2.functional.center_crop(boxes, list(self.step.size))


class _Resized:
    """A step that resizes the image to a size of its choice."""

    def __init__(self, step: ResizeKeepRatio) -> None:
        self.step = step

    def __call__(self, image: Any, boxes: BoundingBoxes) -> tuple[Any, BoundingBoxes]:
        image = self.step(image)
        return image, v2.functional.resize(boxes, [image.height, image.width])


def boxes_of(boxes: list[tuple[float, float, float, float]], image: Any) -> BoundingBoxes:
    """Boxes (left, top, right, bottom) of a PIL image, or no boxes of none, which the transforms can move."""
    numbers = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    size = (1, 1) if image is None else (image.height, image.width)
    return BoundingBoxes(numbers, format="XYXY", canvas_size=size)


def _for_boxes(step: Any) -> Any:
    """The step of transforms v2 that moves boxes as `step` moves the image; None where nothing moves."""
    if isinstance(step, v1.RandomResizedCrop):
        return v2.RandomResizedCrop(step.size, step.scale, step.ratio, step.interpolation, step.antialias)
    if isinstance(step, v1.RandomHorizontalFlip):
        return v2.RandomHorizontalFlip(step.p)
    if isinstance(step, v1.Resize):
        return v2.Resize(step.size, step.interpolation, step.max_size, step.antialias)
    if isinstance(step, v1.CenterCrop):
        return v2.CenterCrop(step.size)
    if isinstance(step, ResizeKeepRatio):
        return _Resized(step)
    if isinstance(step, CenterCropOrPad):
        return _Centred(step)
    if isinstance(step, (v2.RandomResizedCrop, v2.RandomHorizontalFlip, v2.Resize, v2.CenterCrop)):
        return step
    name = getattr(step, "__name__", type(step).__name__)
    if name not in IN_PLACE:
        raise ValueError(
            f"the image transform has the step {name}; expected steps that boxes can follow: RandomResizedCrop, "
            f"RandomHorizontalFlip, Resize, CenterCrop, ResizeKeepRatio, CenterCropOrPad, {', '.join(IN_PLACE)}"
        )
    return None
