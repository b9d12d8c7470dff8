"""The two terms that `sparc_loss.fused` computes as `sparc_loss.functional` does, held against each other."""

from types import ModuleType

import torch
from strategies import Batch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from sparc_loss import fused

NAMES = ("patch_features", "token_features", "logit_scale")
# The arguments that a term has of its own.
TERMS = {"fine_grained_loss": {}, "image_contrastive_loss": {"image_negatives": 2}}


def term_of(module: ModuleType, term: str, batch: Batch, **options: object) -> Tensor:
    """The term of `functional` or `fused`."""
    return getattr(module, term)(**{**vars(batch), **TERMS[term], **options})


def loss_and_gradients(
    module: ModuleType, term: str, batch: Batch, weight: float = 1.0, **options: object
) -> dict[str, Tensor]:
    """The term of `functional` or `fused`, and `weight` times its gradients."""
    inputs = {name: torch.as_tensor(getattr(batch, name)).detach().clone() for name in NAMES}
    if batch.patch_features.dtype == torch.float64:
        inputs["logit_scale"] = inputs["logit_scale"].double()
    for each in inputs.values():
        each.requires_grad_()
    loss = term_of(module, term, batch.but(**inputs), **options)
    gradients = torch.autograd.grad(loss, list(inputs.values()), torch.as_tensor(weight, dtype=loss.dtype))
    return {"loss": loss.detach(), **dict(zip(NAMES, gradients, strict=True))}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest component, which for a sum of terms that cancel is taken to be 1."""
    for name, value in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (value.dtype, value.shape)
        size = max(1.0, value.abs().max().item())
        assert_close(actual[name], value, rtol=0, atol=tolerance * size, msg=lambda text, name=name: f"{name}: {text}")


def random_batch(lengths: list[int], patches: int, length: int, dim: int, dtype: torch.dtype = torch.float64) -> Batch:
    """Caption b has lengths[b] tokens at random positions."""
    mask = torch.rand(len(lengths), length).argsort(dim=1).argsort(dim=1) < torch.tensor(lengths)[:, None]
    return Batch(
        patch_features=torch.randn(len(lengths), patches, dim, dtype=dtype),
        token_features=torch.randn(len(lengths), length, dim, dtype=dtype),
        token_mask=mask,
        logit_scale=10.0,
    )


def node_names(tensor: Tensor) -> list[str]:
    """The names of the nodes of its graph."""
    nodes, names = [tensor.grad_fn], []
    while nodes:
        node = nodes.pop()
        names.append(node.name())
        nodes += [each for each, _ in node.next_functions if each is not None]
    return names


def flops(term: str, batch: Batch, **options: object) -> int:
    """Of the fused term, and of its gradients where autograd is on."""
    batch = batch.with_gradients()
    with FlopCounterMode(display=False) as counter:
        loss = term_of(fused, term, batch, **options)
        if loss.requires_grad:
            loss.backward()
    return counter.get_total_flops()
