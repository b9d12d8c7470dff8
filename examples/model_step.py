"""What the objectives add to a training step of ViT-B/16 on a GPU. `make bench` runs it where there is one."""

import statistics
import time
from collections.abc import Callable
from functools import partial

import open_clip
import torch
from torch import Tensor, nn

from sparc_loss import SparcLoss, surface_embeddings
from sparc_loss.losses import FilipLoss, GloriaLoss, PaclLoss

_HIGHEST = {"image_negatives": 3, "image_contrastive_direction": "both", "image_contrastive_threshold": 1.0}
OBJECTIVES: dict[str, Callable[[], nn.Module] | None] = {
    "CLIP": None,
    "SPARC": SparcLoss,
    "SPARC, eager": partial(SparcLoss, implementation="eager"),
    "SPARC + 3 image negatives": partial(SparcLoss, image_negatives=3),
    "SPARC + 3, highest patches": partial(SparcLoss, **_HIGHEST),
    "FILIP": FilipLoss,
    "PACL": PaclLoss,
    "GLoRIA": GloriaLoss,
}


def model_steps(pairs: int = 256, repeats: int = 12, name: str = "ViT-B-16") -> list[dict]:
    """Milliseconds of a step by objective, with quartiles, and what each adds to CLIP's of the same round.

    A step is forward and backward under bfloat16 autocast, and AdamW. Captions have about 16 tokens of 77.
    """
    generator = torch.Generator().manual_seed(0)
    size = open_clip.get_model_config(name)["vision_cfg"]["image_size"]
    images = torch.randn(pairs, 3, size, size, generator=generator).cuda()
    numbers = torch.empty(pairs).log_normal_(2.65, 0.5, generator=generator).round().clamp(3, 77)
    tokenizer = open_clip.get_tokenizer(name)
    texts = tokenizer([" ".join(["dog"] * int(number - 2)) for number in numbers]).cuda()
    steps = {}
    for objective, make_loss in OBJECTIVES.items():
        surfaced = make_loss is not None
        if objective in ("CLIP", "SPARC"):  # the other objectives train the second model on
            model = open_clip.create_model(name, device="cuda")
            if surfaced:
                surface_embeddings(model, tokenizer)
            model.train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        steps[objective] = partial(_step, model, optimizer, make_loss() if make_loss else None, images, texts)

    seconds: dict[str, list[float]] = {objective: [] for objective in steps}
    peaks = {}
    for round_ in range(repeats + 1):
        for objective, step in steps.items():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            step()
            torch.cuda.synchronize()
            if round_:
                seconds[objective].append(time.perf_counter() - start)
                peaks[objective] = torch.cuda.max_memory_allocated() - before
    rows = []
    for objective, each in seconds.items():
        added = [own / clip - 1 for own, clip in zip(each, seconds["CLIP"], strict=True)]
        rows.append(
            {
                "objective": objective,
                "pairs": pairs,
                "milliseconds": [1e3 * value for value in statistics.quantiles(each, n=4)],
                "over_clip": statistics.quantiles(added, n=4),
                "peak_bytes": peaks[objective],
            }
        )
    return rows


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: nn.Module | None, images: Tensor, texts: Tensor
) -> None:
    optimizer.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        outputs = model(images, texts)
        value = loss(**outputs) if loss is not None else open_clip.ClipLoss()(*outputs[:3])
    value.backward()
    optimizer.step()


def show_model_steps(rows: list[dict]) -> None:
    """Print them."""
    print(f"\nA training step of {rows[0]['pairs']} pairs")
    for row in rows:
        low, middle, high = row["milliseconds"]
        over = "{1:+6.1%} ({0:+.1%} to {2:+.1%})".format(*row["over_clip"])
        print(
            f"  {row['objective']:30} {middle:7.1f} ms ({low:.1f} to {high:.1f}) {over:>28}"
            f" {row['peak_bytes'] / 2**20:8.0f} MiB"
        )
