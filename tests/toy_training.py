"""A linear model of features, its batches, and one training step on one process or on a rank of many."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from sparc_loss import SparcLoss

B, P, L, D = 3, 5, 6, 4  # on each rank

# Captions of as many ranks as there are, three at most.
LENGTHS = {
    "very different lengths": [[6, 5, 6], [1, 0, 2], [3, 3, 3]],
    "a rank without captions": [[0, 0, 0], [6, 1, 4], [2, 0, 5]],
    "no captions at all": [[0, 0, 0], [0, 0, 0], [0, 0, 0]],
}


class LinearModel(nn.Module):
    """Pooled and local features from one linear map per modality, as a surfaced open_clip model returns them."""

    def __init__(self, siglip: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Linear(D, D, dtype=torch.float64)
        self.text = nn.Linear(D, D, dtype=torch.float64)
        self.logit_scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.logit_bias = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64)) if siglip else None

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        patches, tokens = self.image(images), self.text(texts)
        output = {
            "image_features": F.normalize(patches.mean(dim=1), dim=-1),
            "text_features": F.normalize(tokens.mean(dim=1), dim=-1),
            "logit_scale": self.logit_scale.exp(),
            "patch_features": patches,
            "token_features": tokens,
        }
        return output if self.logit_bias is None else {**output, "logit_bias": self.logit_bias}


def whole_batch(lengths: str, world_size: int) -> dict[str, Tensor]:
    """The batch of all ranks in their order; a few tokens may use no patch, so they do not count."""
    generator = torch.Generator().manual_seed(1)
    flat = torch.tensor(LENGTHS[lengths][:world_size]).flatten()
    size = len(flat)
    batch = {
        "images": torch.randn(size, P, D, generator=generator, dtype=torch.float64),
        "texts": torch.randn(size, L, D, generator=generator, dtype=torch.float64),
        "token_mask": torch.arange(L) < flat[:, None],
        "region_mask": torch.rand(size, L, P, generator=generator) < 0.7,
    }
    batch["region_mask"][0, 1:3] = False
    batch["region_mask"][-1, 0] = False
    return batch


def sharded(model: nn.Module) -> nn.Module:
    """Under FSDP2, which takes no scalars: they stay each rank's own."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model.image, model.text):
        fully_shard(layer, mesh=mesh)
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda model: model,
    "DDP": DistributedDataParallel,
    "FSDP2": sharded,
}


@dataclass(frozen=True)
class Setting:
    """How to train: the captions of every rank, the loss, and what carries the gradients over ranks."""

    lengths: str
    global_loss: str = "ClipLoss"
    local_loss: bool = True
    reduction: str = "token"
    wrapper: str = "DDP"
    accum_freq: int = 1
    image_negatives: int = 0
    image_contrastive_direction: str = "text_to_image"


def train_step(setting: Setting, batch: dict[str, Tensor], rank: int = 0, world_size: int = 1) -> dict[str, Tensor]:
    """The loss of one step on this rank's batch, and the gradient of every parameter."""
    siglip = setting.global_loss == "SigLipLoss"
    model = LinearModel(siglip)
    ranks = {"rank": rank, "world_size": world_size}
    if siglip:
        global_loss = SigLipLoss(**ranks)
    else:
        global_loss = ClipLoss(local_loss=setting.local_loss, gather_with_grad=True, **ranks)
    options = {
        name: getattr(setting, name) for name in ("reduction", "image_negatives", "image_contrastive_direction")
    }
    loss = SparcLoss(**options, gather_with_grad=True, global_loss=global_loss, **ranks)
    total = _accumulate(WRAPPERS[setting.wrapper](model), loss, batch, setting.accum_freq)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    if setting.wrapper == "FSDP2":
        dist.all_reduce(gradients["logit_scale"])
        gradients["logit_scale"] /= world_size
    return {
        "loss": total,
        **{name: getattr(each, "full_tensor", lambda each=each: each)() for name, each in gradients.items()},
    }


def _accumulate(model: nn.Module, loss: nn.Module, batch: dict[str, Tensor], accum_freq: int) -> Tensor:
    """As open_clip_train's loop: features of all parts first, then each part again with its gradient."""
    parts = [{name: value.chunk(accum_freq)[index] for name, value in batch.items()} for index in range(accum_freq)]
    with torch.no_grad():
        cached = [_output(model, part) for part in parts] if accum_freq > 1 else [{}]
    for index, part in enumerate(parts):
        output = _output(model, part)
        for name, value in output.items():
            if accum_freq > 1 and name not in ("logit_scale", "logit_bias"):
                others = [each[name] for each in cached]
                output[name] = torch.cat([*others[:index], value, *others[index + 1 :]])
        total = loss(**output)
        total.backward()
    return total.detach()


def _output(model: nn.Module, part: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        **model(part["images"], part["texts"]),
        "token_mask": part["token_mask"],
        "region_mask": part["region_mask"],
    }


def train_every_way(rank: int, world_size: int, settings: dict[str, Setting]) -> dict[str, dict[str, Tensor]]:
    """`train_step` on this rank's share, for each of several settings."""
    return {
        name: train_step(
            setting,
            {key: value.chunk(world_size)[rank] for key, value in whole_batch(setting.lengths, world_size).items()},
            rank,
            world_size,
        )
        for name, setting in settings.items()
    }
