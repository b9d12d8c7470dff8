"""A step of a surfaced model whose towers are sharded by FSDP2, on one rank of many or on one process without it."""

import torch
from tiny_models import ToyTokenizer, captions, custom_text_clip, images_for
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sparc_loss import SparcLoss, restore, surface_embeddings


def surfaced_step(rank: int = 0, world_size: int = 1, pairs: int = 4) -> dict[str, Tensor | str]:
    """The loss of this rank's pairs, the gradient of every parameter, and what `restore` says."""
    model = custom_text_clip().double()
    surface_embeddings(model, ToyTokenizer()).train()
    if world_size > 1:
        mesh = init_device_mesh("cpu", (world_size,))
        for module in (model.visual, model.text, model):
            fully_shard(module, mesh=mesh, ignored_params={model.logit_scale} if module is model else None)
    images, texts = images_for(model, pairs).double(), captions(pairs)
    share = slice(rank * pairs // world_size, (rank + 1) * pairs // world_size)
    loss = SparcLoss(reduction="sample", global_weight=0.0)
    total = loss(**model(images[share], texts[share]))
    total.backward()
    gradients = {
        name: getattr(parameter.grad, "full_tensor", lambda grad=parameter.grad: grad)()
        for name, parameter in model.named_parameters()
        if parameter is not model.logit_scale
    }
    try:
        said = type(restore(model)).__name__
    except TypeError as error:
        said = str(error)
    return {"loss": total.detach(), "said": said, **gradients}


def sharded_step(rank: int, world_size: int) -> dict[str, Tensor | str]:
    """`surfaced_step` on this rank."""
    torch.manual_seed(0)
    return surfaced_step(rank, world_size)
