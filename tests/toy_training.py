"""A linear model of features, its batches, and one training step on one process or, under DDP, on a rank of many."""

import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from sparc_loss import SparcLoss

B, P, L, D = 3, 5, 6, 4  # on each rank

# Captions of two ranks.
LENGTHS = {
    "very different lengths": [[6, 5, 6], [1, 0, 2]],
    "a rank without captions": [[0, 0, 0], [6, 1, 4]],
    "no captions at all": [[0, 0, 0], [0, 0, 0]],
}
GLOBAL_LOSSES = ("ClipLoss", "SigLipLoss")


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


def whole_batch(lengths: list[list[int]]) -> dict[str, Tensor]:
    """The batch of all ranks in their order; a few tokens may use no patch, so they do not count."""
    generator = torch.Generator().manual_seed(1)
    flat = torch.tensor(lengths).flatten()
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


def train_step(
    batch: dict[str, Tensor], lossname: str, reduction: str, local_loss: bool, rank: int = 0, world_size: int = 1
) -> dict[str, Tensor]:
    """The loss of one step and, averaged over ranks by DDP, the gradient of every parameter."""
    siglip = lossname == "SigLipLoss"
    model = LinearModel(siglip)
    ranks = {"rank": rank, "world_size": world_size}
    if siglip:
        global_loss = SigLipLoss(**ranks)
    else:
        global_loss = ClipLoss(local_loss=local_loss, gather_with_grad=True, **ranks)
    loss = SparcLoss(reduction=reduction, gather_with_grad=True, global_loss=global_loss, **ranks)
    wrapped = DistributedDataParallel(model) if world_size > 1 else model
    total = loss(
        **wrapped(batch["images"], batch["texts"]),
        token_mask=batch["token_mask"],
        region_mask=batch["region_mask"],
    )
    total.backward()
    return {"loss": total.detach(), **{name: parameter.grad for name, parameter in model.named_parameters()}}


def train_every_way(rank: int, world_size: int, settings: dict[str, tuple]) -> dict[str, dict[str, Tensor]]:
    """`train_step` on this rank's share, for each of several (lengths, loss, reduction, local_loss)."""
    results = {}
    for name, (lengths, *options) in settings.items():
        share = {key: value.chunk(world_size)[rank] for key, value in whole_batch(LENGTHS[lengths]).items()}
        results[name] = train_step(share, *options, rank=rank, world_size=world_size)
    return results
