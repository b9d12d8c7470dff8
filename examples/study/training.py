"""One run: a small open_clip model trained by one objective, in this process, and what it has learnt."""

import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from PIL import Image
from torch import Tensor, nn

from sparc_loss import SparcLoss, surface_embeddings
from sparc_loss.losses import FilipLoss, FlairHeads, FlairLoss, GloriaLoss, MgcaHeads, MgcaLoss, PaclLoss
from sparc_loss.losses.objective import Objective
from sparc_loss.plugins.learned_heads import add_heads

from ..scenes.dataset import read_annotations, read_captions, read_world
from ..scenes.measures import best_background_threshold, embed, levels, measure, read_images
from ..scenes.worlds import WORLDS
from .cures import CURES, region_masks
from .plan import GLOBAL_WEIGHT, LEARNING_RATES, Pooling, Run, Size

LOSSES = {
    "sparc": SparcLoss,
    "filip": FilipLoss,
    "pacl": PaclLoss,
    "gloria": GloriaLoss,
    "mgca": MgcaLoss,
    "flair": FlairLoss,
}
HEADS = {"mgca": MgcaHeads, "flair": FlairHeads}


class Folders(NamedTuple):
    """Where a study keeps its parts."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    def model(self, pooling: Pooling, seed: int) -> Path:
        """The untrained model, as open_clip loads it."""
        return self.root / "models" / f"{pooling}-seed{seed}"

    def result(self, run: Run) -> Path:
        return self.root / "results" / f"{run.name}.json"

    def weights(self, run: Run) -> Path:
        return self.root / "weights" / f"{run.name}.pt"


def execute(run: Run, size: Size, folders: Folders) -> dict[str, Any]:
    """Train, leave the weights, and measure.

    Returns:
        The measures of both held-out splits by their names, the background threshold, and the mean loss of the last
        tenth of the steps.
    """
    torch.manual_seed(run.seed)
    name = f"local-dir:{folders.model(run.pooling, run.seed)}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    surface_embeddings(model, tokenizer)
    if run.origin is not None:
        model.load_state_dict(torch.load(folders.weights(run.origin), weights_only=True))
    if run.family in HEADS:
        add_heads(model, f"{run.family}_heads", HEADS[run.family])
    model.to(size.device)

    if size.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as open_clip's training has it
    images = _training_images(folders.data)
    texts = tokenizer(read_captions(folders.data, "train"))
    regions = _regions(
        read_world(folders.data),
        round(run.boxes * len(images)),
        model.encode_patches(images[:1].float().to(size.device))[1],
        texts.shape[1],
    )
    images, texts = images.to(size.device), texts.to(size.device)
    loss = train(model, make_loss(run), run, size, images, texts, preprocess.transforms[-1], regions)

    folders.weights(run).parent.mkdir(exist_ok=True)
    torch.save(model.state_dict(), folders.weights(run))
    val, test = read_annotations(folders.data, "val"), read_annotations(folders.data, "test")
    of_val = embed(model, tokenizer, read_images(val, preprocess), val)
    of_test = embed(model, tokenizer, read_images(test, preprocess), test)
    threshold = best_background_threshold(of_val, val)
    return {
        "val": measure(of_val, val, threshold),
        "test": measure(of_test, test, threshold),
        "levels": {name: level._asdict() for name, level in levels(of_test, test).items()},
        "background_threshold": threshold,
        "training_loss": loss,
    }


def make_loss(run: Run) -> Objective:
    """The run's objective; CLIP is SPARC without its fine-grained half."""
    if run.family == "clip":
        return SparcLoss(global_weight=GLOBAL_WEIGHT, fine_grained_weight=0.0)
    loss = CURES[run.cure] if run.cure else LOSSES[run.family]
    return loss(**{"global_weight": GLOBAL_WEIGHT, **dict(run.settings)})


def train(
    model: nn.Module,
    loss: Objective,
    run: Run,
    size: Size,
    images: Tensor,
    texts: Tensor,
    normalize: Any,
    regions: Tensor | None = None,
) -> float:
    """Train in place, as open_clip_train does: AdamW, warm-up, cosine decay, the scale at most 100.

    Args:
        images: uint8 [N, 3, H, W], on the size's device.
        texts: token ids [N, L], there too.
        normalize: takes floating-point images in [0, 1].
        regions: bool [M, L, P], what the tokens of the first M pairs may use.

    Returns:
        The mean loss of the last tenth of the steps.
    """
    steps = size.steps(run)
    learning_rate = size.learning_rate * LEARNING_RATES[run.start]
    optimizer = torch.optim.AdamW(_parameter_groups(model, loss), lr=learning_rate, betas=(0.9, 0.98), eps=1e-6)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _decay(step, steps, size.warmup))
    weight, begin = loss.fine_grained_weight, round(run.delay * steps)
    loss.to(size.device)
    model.train()
    losses = []
    for step, batch in zip(range(steps), _batches(len(images), size.batch_size, run.seed), strict=False):
        loss.fine_grained_weight = weight if step >= begin else 0.0
        loss.progress = step / steps
        outputs = model(normalize(images[batch].float() / 255), texts[batch])
        if run.shuffled:
            outputs["patch_features"] = outputs["patch_features"].roll(1, dims=0)
        if regions is not None:
            outputs["region_mask"] = _of_batch(regions, batch).to(size.device)
        value = loss(**outputs)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        losses.append(value.detach())
    last = torch.stack(losses[-max(1, steps // 10) :]).tolist()
    return sum(last) / len(last)


@cache
def _regions(world: str, count: int, grid: tuple[int, int], length: int) -> Tensor | None:
    return region_masks(WORLDS[world], count, grid, length) if count else None


def _of_batch(regions: Tensor, batch: Tensor) -> Tensor:
    """The regions of the pairs in a batch; all of the image where there are none."""
    known = batch < len(regions)
    masks = torch.ones(len(batch), *regions.shape[1:], dtype=torch.bool)
    masks[known] = regions[batch[known]]
    return masks


@cache
def _training_images(data: Path) -> Tensor:
    """uint8 [N, 3, H, W], once in each process."""
    # By number, as the captions go: as text "100000" would come before "10001".
    paths = sorted((data / "images" / "train").iterdir(), key=lambda path: int(path.stem))
    return torch.stack([_pixels(path) for path in paths])


def _pixels(path: Path) -> Tensor:
    with Image.open(path) as file:
        image = file.convert("RGB")
    return (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        .view(image.height, image.width, 3)
        .permute(2, 0, 1)
    )


def _batches(number: int, batch_size: int, seed: int):
    """Indices of batches without end; the same for every objective with the seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(number, generator=generator)[: number - number % batch_size].split(batch_size)


def _parameter_groups(*modules: nn.Module) -> list[dict[str, Any]]:
    """Weight decay for matrices only."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return [
        {"params": [each for each in parameters if each.ndim < 2], "weight_decay": 0.0},
        {"params": [each for each in parameters if each.ndim >= 2], "weight_decay": 0.1},
    ]


def _decay(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
