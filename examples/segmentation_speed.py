"""What `sparc-loss evaluate --suite voc20` costs beside the model's forward: reading, windowing and scoring.

Made images of VOC's usual size, one process, an untrained ViT-B/16, the suite's plain protocol. `make bench` runs it.
"""

import statistics
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image

from sparc_loss.embeddings import surface_embeddings
from sparc_loss.evaluation.dataset import DataError, EvaluationData
from sparc_loss.evaluation.evaluate import Options
from sparc_loss.evaluation.evaluate_windows import evaluate_windows
from sparc_loss.evaluation.suites import SUITES, DataFolder

HEIGHT, WIDTH = 375, 500


def photograph(generator: np.random.Generator) -> Image.Image:
    """Smooth noise, which compresses as photographs do."""
    coarse = generator.integers(0, 255, (HEIGHT // 25, WIDTH // 25, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def write_voc(root: Path, images: int) -> None:
    """Images of smooth noise, as JPEG compresses photographs, and masks of two classes."""
    base = root / "VOCdevkit" / "VOC2012"
    generator = np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (base / folder).mkdir(parents=True)
    for index in range(images):
        photograph(generator).save(base / "JPEGImages" / f"{index}.jpg", quality=95)
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[:, WIDTH // 2 :] = 1 + index % 20
        Image.fromarray(mask).save(base / "SegmentationClass" / f"{index}.png")
    names = "".join(f"{index}\n" for index in range(images))
    (base / "ImageSets" / "Segmentation" / "val.txt").write_text(names, encoding="utf-8")


def seconds_of_images(model: Any, tokenizer: Any, data: EvaluationData) -> list[dict[str, float]]:
    """For each image, the seconds of the model's forward and of everything else."""
    forward = 0.0
    plain = model.encode_patches

    def timed(*inputs: Any, **named: Any) -> Any:
        nonlocal forward
        start = time.perf_counter()
        result = plain(*inputs, **named)
        forward += time.perf_counter() - start
        return result

    protocol = replace(SUITES["voc20"].protocols["plain"], templates=("{}",))
    model.encode_patches = timed
    rows = []
    for index in range(len(data.images)):
        one = replace(data, images=data.images[index : index + 1], masks=data.masks[index : index + 1])
        spent = []
        for measured in (EvaluationData(data.classes, mask_coding=data.mask_coding), one):
            # Without images, what a run has once: the names of the classes, before it says that there is nothing.
            forward, start = 0.0, time.perf_counter()
            with suppress(DataError):
                evaluate_windows(model, tokenizer, measured, protocol, Options(batch_size=8))
            spent.append(time.perf_counter() - start)
        rows.append({"forward": forward, "rest": max(spent[1] - spent[0] - forward, 0.0)})
    del model.encode_patches
    return rows


def segmentation_speed(images: int = 8, model_name: str = "ViT-B-16") -> dict[str, Any]:
    """Seconds per image, and the share of the rest in the forward, with quartiles."""
    model = open_clip.create_model(model_name)
    tokenizer = open_clip.get_tokenizer(model_name)
    surface_embeddings(model, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        write_voc(Path(folder), images + 1)
        data = SUITES["voc20"].read(DataFolder(Path(folder), SUITES["voc20"]))[""]
        rows = seconds_of_images(model, tokenizer, data)[1:]  # the first warms up
    shares = [row["rest"] / row["forward"] for row in rows]
    return {
        "model": model_name,
        "images": images,
        "forward_seconds": statistics.median(row["forward"] for row in rows),
        "rest_seconds": statistics.median(row["rest"] for row in rows),
        "rest_over_forward": statistics.quantiles(shares, n=4),
        "threads": torch.get_num_threads(),
    }


def show_segmentation_speed(result: dict[str, Any]) -> None:
    """Print it."""
    low, middle, high = result["rest_over_forward"]
    print(
        f"\nvoc20, plain protocol, {result['images']} made images of {WIDTH} x {HEIGHT}, {result['model']}: forward "
        f"{result['forward_seconds']:.2f} s an image; reading, windowing and scoring {result['rest_seconds']:.3f} s, "
        f"{middle:.1%} of the forward ({low:.1%} to {high:.1%})"
    )
