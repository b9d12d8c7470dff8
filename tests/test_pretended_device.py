"""On a device that is not the CPU: the same values, nothing mixed, and the host does not wait.

`tests/test_cuda.py` holds the same on a GPU; this is in every run.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import open_clip
import pytest
import tiny_models
import torch
from baseline_outputs import FEATURES, random_outputs
from pretended_device import DEVICE, Pretended, held, on_device, pretended_device
from tiny_models import ToyTokenizer, captions, images_for
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

from sparc_loss import SparcLoss, functional, losses, surface_embeddings
from sparc_loss.regions.behind_texts import packed, sizes_for, take_regions

HIGHEST = {"image_negatives": 2, "image_contrastive_direction": "both", "image_contrastive_threshold": 1.0}
SETTINGS = {
    "as in the paper": {},
    "with image negatives": {"image_negatives": 2},
    "in both directions": {"image_negatives": 2, "image_contrastive_direction": "both"},
    "highest patches": HIGHEST,
    "softmax, by sample, diagnostics": {"alignment": "softmax", "reduction": "sample", "diagnostics": True},
    "fixed scale": {"fine_grained_scale": 10.0, "global_weight": 0.5},
}
# Of the norm; float16 and bfloat16 are rounded at the same places on both.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

Move = Callable[[Tensor], Tensor]


def batch(masks: bool, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    torch.manual_seed(0)
    outputs = random_outputs(batch=6, patches=9, length=7, dim=16, dtype=torch.float64)
    if masks:
        outputs["patch_mask"] = torch.rand(6, 9) < 0.8
        outputs["region_mask"] = torch.rand(6, 7, 9) < 0.7
        outputs["token_mask"] &= torch.rand(6, 7) < 0.8
    return {
        name: value.detach().to(dtype) if value.is_floating_point() and value.ndim else value.detach()
        for name, value in outputs.items()
    }


def value_and_gradients(objective: nn.Module, outputs: dict[str, Tensor], move: Move) -> list[Tensor]:
    leaves = {name: move(value.clone().requires_grad_(name in FEATURES)) for name, value in outputs.items()}
    torch.manual_seed(1)  # some objectives draw tokens
    total = sum(objective(**leaves, output_dict=True).values())
    return [total.detach(), *torch.autograd.grad(total, [leaves[name] for name in FEATURES], materialize_grads=True)]


def compared(objective: nn.Module, outputs: dict[str, Tensor], tolerance: float) -> list[str]:
    """What made the host wait, once the values are found to be those of the CPU."""
    expected = value_and_gradients(objective, outputs, lambda tensor: tensor)
    with pretended_device() as waits:
        actual = value_and_gradients(objective, outputs, on_device)
    for one, other in zip(actual, expected, strict=True):
        assert (held(one).double() - other.double()).norm() <= tolerance * max(1e-3, other.double().norm())
    return waits


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("implementation", ["eager", "fused", "auto"])
@pytest.mark.parametrize("name", SETTINGS)
def test_sparc_has_the_values_of_the_cpu_and_never_waits(name, implementation, dtype, masks):
    loss = SparcLoss(implementation=implementation, **SETTINGS[name])
    assert compared(loss, batch(masks, dtype), TOLERANCES[dtype]) == []


@pytest.mark.parametrize(
    "make",
    [partial(losses.FilipLoss, token_dropping=0.0), losses.PaclLoss, losses.GloriaLoss],
    ids=["FILIP", "PACL", "GLoRIA"],
)
def test_objectives_of_all_pairs_wait_once_for_the_numbers_of_tokens(make):
    outputs = batch(masks=True)
    del outputs["region_mask"]
    assert compared(make(), outputs, 1e-12) == ["aten._to_copy.default"]


def test_filip_drops_tokens_without_waiting_for_them():
    outputs = batch(masks=False)
    with pretended_device() as waits:
        value_and_gradients(losses.FilipLoss(token_dropping=0.5), outputs, on_device)
    assert waits == ["aten._to_copy.default"]


@pytest.mark.parametrize(
    ("heads", "make", "waits"),
    # FLAIR scores all pairs.
    [(losses.MgcaHeads, losses.MgcaLoss, 0), (losses.FlairHeads, losses.FlairLoss, 1)],
    ids=["MGCA", "FLAIR"],
)
def test_objectives_with_learned_heads_have_the_values_of_the_cpu(heads, make, waits):
    torch.manual_seed(0)
    heads, loss = heads(16).double(), make()

    class Both(nn.Module):
        def forward(self, output_dict: bool, **outputs: Tensor) -> dict[str, Tensor]:
            move = on_device if isinstance(outputs["patch_features"], Pretended) else torch.clone
            parameters = {name: move(value) for name, value in heads.named_parameters()}
            return loss(**outputs, **functional_call(heads, parameters, (), outputs), output_dict=output_dict)

    outputs = batch(masks=False)
    assert len(compared(Both(), outputs, 1e-10)) == waits


TOWERS = {
    **{f"CustomTextCLIP, {name}": partial(tiny_models.custom_text_clip, vision=name) for name in tiny_models.VISION},
    **{
        f"CustomTextCLIP, {name}": partial(tiny_models.custom_text_clip, text=name) for name in tiny_models.CUSTOM_TEXT
    },
    "CLIP": tiny_models.clip,
}


def step(model: nn.Module, loss: nn.Module, images: Tensor, texts: Tensor, move: Move) -> tuple[Tensor, list[Tensor]]:
    """Forward, loss and backward, as in a training step; the loss and the gradients of the parameters."""
    parameters = {name: move(value.detach().requires_grad_()) for name, value in model.named_parameters()}
    buffers = {name: move(value) for name, value in model.named_buffers()}
    torch.manual_seed(1)  # some towers drop paths
    outputs = functional_call(model, {**parameters, **buffers}, (move(images), move(texts)))
    total = loss(**outputs)
    return total.detach(), list(torch.autograd.grad(total, list(parameters.values()), materialize_grads=True))


def waits_of_plain_open_clip(model: nn.Module, images: Tensor, texts: Tensor) -> list[str]:
    """What makes the host wait in the towers of open_clip, timm and transformers themselves; nothing in new versions.

    open_clip 3.0 fetches indices from the CPU; transformers 5 asks a mask whether there is any padding.
    """

    def global_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        return (logit_scale * image_features @ text_features.T).logsumexp(dim=1).mean()

    model.output_dict = True
    with pretended_device() as waits:
        step(model, global_loss, images, texts, on_device)
    return waits


@pytest.mark.parametrize("name", TOWERS)
def test_a_step_with_surfaced_towers_has_the_values_of_the_cpu_and_no_wait_of_ours(name):
    model = TOWERS[name]().train().double()
    images, texts = images_for(model, 3).double(), captions(3)
    plain = waits_of_plain_open_clip(model, images, texts)
    surface_embeddings(model, ToyTokenizer())
    loss = SparcLoss(**HIGHEST)
    expected, gradients = step(model, loss, images, texts, lambda tensor: tensor.clone())
    with pretended_device() as waits:
        actual, on_the_device = step(model, loss, images, texts, on_device)
    assert_close(held(actual), expected)
    for one, other in zip(on_the_device, gradients, strict=True):
        assert_close(held(one), other)
    assert waits == plain
    assert open_clip.__version__ < "3.3" or waits == []


def test_a_text_tower_of_hugging_face_waits_as_often_as_in_plain_open_clip(tmp_path: Path):
    model = tiny_models.hf_clip(tmp_path).train()
    images, texts = images_for(model, 3), captions(3)
    plain = waits_of_plain_open_clip(model, images, texts)
    surface_embeddings(model, ToyTokenizer())
    with pretended_device() as waits:
        step(model, SparcLoss(), images, texts, on_device)
    assert waits == plain


def test_regions_behind_the_texts_are_unpacked_without_waiting():
    model = tiny_models.clip().train().double()
    images, texts = images_for(model, 3).double(), captions(3)
    plain = waits_of_plain_open_clip(model, images, texts)
    surface_embeddings(model, ToyTokenizer())
    sizes = sizes_for(model)
    masks = torch.rand(3, sizes.length, sizes.patches, generator=torch.Generator().manual_seed(0)) < 0.7
    texts = torch.cat([texts, torch.stack([packed(mask) for mask in masks])], dim=1)
    take_regions(model, sizes)
    expected, _ = step(model, SparcLoss(), images, texts, lambda tensor: tensor.clone())
    with pretended_device() as waits:
        actual, _ = step(model, SparcLoss(), images, texts, on_device)
    assert_close(held(actual), expected)
    assert waits == plain


class TestTheDeviceItself:
    def test_it_computes_and_says_where_it_is(self):
        tensor = on_device(torch.arange(6.0).view(2, 3).requires_grad_())
        result = (tensor * 2).sum(dim=1)
        assert result.device == DEVICE
        assert result.is_leaf is False
        assert held(result).tolist() == [6, 24]
        (gradient,) = torch.autograd.grad(result.sum(), [tensor])
        assert held(gradient).tolist() == [[2, 2, 2], [2, 2, 2]]

    def test_it_does_not_mix_with_the_cpu(self):
        tensor = on_device(torch.ones(3))
        with pretended_device(), pytest.raises(RuntimeError, match="on two devices, meta and cpu"):
            tensor + torch.ones(3)
        assert held(tensor + torch.tensor(2.0)).tolist() == [3, 3, 3]

    def test_it_makes_tensors(self):
        with pretended_device() as waits:
            ones = torch.ones(2, device=DEVICE)
            assert held(ones + torch.arange(2, device=ones.device)).tolist() == [1, 2]
            assert torch.ones(2).device.type == "cpu"
        assert waits == []

    @pytest.mark.parametrize(
        "read",
        [
            lambda tensor: tensor.sum().item(),
            lambda tensor: tensor.tolist(),
            lambda tensor: bool(tensor.any()),
            lambda tensor: int(tensor.sum()),
            lambda tensor: tensor.cpu(),
            lambda tensor: tensor.to("cpu"),
            lambda tensor: tensor[tensor > 1],
            lambda tensor: tensor.nonzero(),
            lambda tensor: torch.where(tensor > 1),
            lambda tensor: torch.masked_select(tensor, tensor > 1),
            lambda tensor: torch.unique(tensor),
            lambda tensor: torch.equal(tensor, tensor),
            lambda tensor: tensor.repeat_interleave(tensor.long()),
            lambda tensor: tensor[torch.arange(2)],
            lambda tensor: torch.ones(2).to(tensor.device),
            lambda tensor: tensor.copy_(torch.ones(4)),
            lambda tensor: torch.ones(4).copy_(tensor),
        ],
    )
    def test_it_counts_what_makes_the_host_wait(self, read):
        tensor = on_device(torch.arange(4.0))
        with pretended_device() as waits:
            tensor * 2 + tensor.masked_fill(tensor > 1, 0).clamp(min=1)
            assert waits == []
            read(tensor)
        assert len(waits) >= 1

    def test_a_copy_to_the_device_that_is_not_waited_for_does_not_count(self):
        with pretended_device() as waits:
            assert held(torch.ones(2).to(DEVICE, non_blocking=True)).tolist() == [1, 1]
        assert waits == []

    def test_an_item_in_the_loss_is_found(self, monkeypatch):
        weights = functional.alignment_weights

        def reading(similarity: Tensor, *arguments, **named) -> Tensor:
            similarity.max().item()
            return weights(similarity, *arguments, **named)

        monkeypatch.setattr(functional, "alignment_weights", reading)
        loss = SparcLoss(implementation="eager")
        assert compared(loss, batch(masks=False), 1e-12) == ["aten._local_scalar_dense.default"]
