"""One training step with a baseline objective, on one process or, under DDP, on a rank of many."""

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from toy_training import D, LinearModel, P, whole_batch

from sparc_loss import losses

FEWER_PATCHES = P - 2  # on the last rank, where patches may differ
FEWER_TOKENS = 3  # on the last rank, whose captions of "very different lengths" have at most 2


class ModelWithHeads(nn.Module):
    """The linear model, and the heads of a loss that has some."""

    def __init__(self, loss: str, world_size: int) -> None:
        super().__init__()
        self.model = LinearModel(siglip=False)
        self.heads = None
        if loss == "MgcaLoss":
            self.heads = losses.MgcaHeads(D, head_dim=3, prototypes=4).double()
        if loss == "FlairLoss":
            self.heads = losses.FlairHeads(D, heads=1, world_size=world_size).double()

    def forward(self, images: Tensor, texts: Tensor, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        output = {**self.model(images, texts), **masks}
        return output if self.heads is None else {**output, **self.heads(**output)}


def baseline_batch(lengths: str, world_size: int = 1, rank: int = 0, fewer: str = "") -> dict[str, Tensor]:
    """A rank's share of the batch. The last of two ranks has less of what `fewer` names, without padding."""
    fewer_patches = fewer == "patches"
    batch = whole_batch(lengths, 2)
    del batch["region_mask"]
    size = len(batch["images"])
    if fewer_patches:
        batch["patch_mask"] = torch.arange(P) < torch.tensor([P, FEWER_PATCHES]).repeat_interleave(size // 2)[:, None]
    batch = {name: value.chunk(world_size)[rank] for name, value in batch.items()}
    if fewer_patches and world_size > 1 and rank == world_size - 1:
        batch = {**batch, "images": batch["images"][:, :FEWER_PATCHES]}
        del batch["patch_mask"]
    if fewer == "tokens" and world_size > 1 and rank == world_size - 1:
        batch = {**batch, **{name: batch[name][:, :FEWER_TOKENS] for name in ("texts", "token_mask")}}
    return batch


def baseline_step(
    name: str, lengths: str, options: dict, fewer: str = "", rank: int = 0, world_size: int = 1
) -> dict[str, Tensor]:
    """The loss of one step and, averaged over ranks by DDP, the gradient of every parameter."""
    batch = baseline_batch(lengths, world_size, rank, fewer)
    model = ModelWithHeads(name, world_size)
    loss = getattr(losses, name)(**options, gather_with_grad=True, rank=rank, world_size=world_size)
    masks = {key: value for key, value in batch.items() if key.endswith("mask")}
    torch.manual_seed(rank)
    wrapped = DistributedDataParallel(model) if world_size > 1 else model
    # Two steps: what a step forgot, the next one of DDP would complain about.
    for _ in range(2):
        model.zero_grad()
        total = loss(**wrapped(batch["images"], batch["texts"], masks))
        total.backward()
    return {"loss": total.detach(), **{key: parameter.grad for key, parameter in model.named_parameters()}}


def step_every_way(rank: int, world_size: int, settings: dict[str, tuple]) -> dict[str, dict[str, Tensor]]:
    """`baseline_step` for each of several (loss, lengths, options, fewer)."""
    return {key: baseline_step(*setting, rank=rank, world_size=world_size) for key, setting in settings.items()}
