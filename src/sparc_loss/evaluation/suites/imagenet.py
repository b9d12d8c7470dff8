"""ImageNet, val: 50,000 images of 1,000 classes, zero-shot.

    imagenet/val/WNID/*.JPEG    one folder for each of the 1,000 classes

From the ImageNet page, "ILSVRC2012", its validation images sorted into folders, as torchvision's `ImageFolder` reads
them. Names and prompts are OpenAI's, of open_clip, in the order of the sorted WNIDs.

    sparc-loss evaluate --suite imagenet --data-root DATA --model ViT-B-16 --pretrained openai
"""

from collections.abc import Mapping
from pathlib import Path

from sparc_loss.evaluation.dataset import DataError, EvaluationData
from sparc_loss.evaluation.suites.suite import DataFolder, Suite


def _read(folder: DataFolder) -> Mapping[str, EvaluationData]:
    from open_clip import IMAGENET_CLASSNAMES
    from torchvision.datasets import ImageFolder

    root = folder.find("imagenet/val")
    try:
        images = ImageFolder(str(root), allow_empty=True)
    except FileNotFoundError as error:
        raise DataError(f"imagenet: {error}; expected {', '.join(folder.suite.layout)}") from error
    data = EvaluationData(list(IMAGENET_CLASSNAMES))
    if len(images.classes) != len(data.classes):
        # The number of a class is its place among the sorted folders.
        raise DataError(
            f"imagenet: {root} has {len(images.classes)} folders; expected {len(data.classes)}, one for each WNID"
        )
    for path, label in images.samples:
        data.add_image(Path(path), label=label)
    if not data.images:
        raise DataError(f"imagenet: {root} has no image in its folders; expected at least one")
    return {"": data}


IMAGENET = Suite(
    "imagenet",
    "classification, ImageNet val, 1,000 classes",
    ("imagenet/val/WNID/*.JPEG",),
    _read,
    families=("classification",),
    protocol="OpenAI's names and 80 prompts, the model's own preprocessing",
)
