"""The formulas of a step's cost are what is counted in small cases; the figures beside the paper's."""

from unittest import mock

import pytest
import torch
from open_clip.loss import ClipLoss
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from examples import update_step
from examples.benchmark import allocated_bytes, count_flops, fused_loss, make_batch
from sparc_loss.losses import FilipLoss, GloriaLoss, MgcaHeads, MgcaLoss, PaclLoss, all_pairs

pytestmark = pytest.mark.slow


def test_sparc_costs_at_most_half_a_percent_of_a_clip_step() -> None:
    *rows, model = update_step.update_steps()
    assert model["gflops_of_a_pair"] == pytest.approx(123.0, abs=0.1)
    assert sum(model["shares"].values()) <= 0.005
    assert model["shares"]["fine-grained loss"] <= 0.0003
    assert [(row["batch_size"], row["objective"]) for row in rows] == [
        (size, name) for size in (2048, 4096, 8192, 16384) for name in update_step.OBJECTIVES
    ]


def test_the_formula_of_the_fine_grained_loss_is_what_is_counted() -> None:
    batch = make_batch((6, 9, 5, 7), torch.float32)
    batch.token_mask[:] = torch.arange(5) < 4
    sizes = update_step.Sizes(pairs=6, ranks=1, patches=9, length=5, tokens=4, dim=7, bytes_each=4)
    cost = update_step.fine_grained_cost(sizes)
    assert count_flops(fused_loss, batch) == cost.flops
    _, held = allocated_bytes(lambda: fused_loss(batch))
    assert held == pytest.approx(cost.bytes - 8 * 2**20, abs=1000)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_formula_of_the_global_loss_is_what_is_counted(ranks: int) -> None:
    own = [F.normalize(torch.randn(6, 7), dim=-1).requires_grad_() for _ in range(2)]

    def gather(*own: Tensor, **_: object) -> list[Tensor]:
        return [torch.cat([features] * ranks) for features in own[:2]]

    loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=0, world_size=ranks)
    with mock.patch("open_clip.loss.gather_features", gather), FlopCounterMode(display=False) as counter:
        loss(*own, torch.tensor(10.0)).backward()
    assert counter.get_total_flops() == update_step.clip_cost(update_step.Sizes(pairs=6, ranks=ranks, dim=7)).flops


class Gathered(torch.autograd.Function):
    """`all_pairs.gathered` of so many ranks that all have this one's tensor."""

    @staticmethod
    def forward(context, tensor: Tensor, ranks: int) -> Tensor:
        context.pairs = len(tensor)
        return torch.cat([tensor] * ranks)

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.clone()[: context.pairs], None


def step_of(
    loss, pairs: int, ranks: int, patches: int, length: int, tokens: int, dim: int, one_fills_the_context: bool = False
):
    """A training step of the fine-grained half by itself, captions of `tokens` tokens, as a function to measure."""
    loss.world_size = ranks
    batch = make_batch((pairs, patches, length, dim), torch.float32)
    outputs = {
        name: F.normalize(value, dim=-1) if value.ndim == 2 and value.is_floating_point() else value
        for name, value in vars(batch).items()
    }
    mask = torch.arange(length).expand(pairs, length) < tokens
    mask[0] |= one_fills_the_context
    outputs["token_mask"] = mask

    def step() -> None:
        heads = MgcaHeads(dim, head_dim=3, prototypes=5) if isinstance(loss, MgcaLoss) else lambda **_: {}
        loss(**outputs, **heads(**outputs)).backward()

    return step


ALL_PAIRS = {FilipLoss: update_step.filip_cost, PaclLoss: update_step.pacl_cost, GloriaLoss: update_step.gloria_cost}


@pytest.mark.parametrize("baseline", ALL_PAIRS)
@pytest.mark.parametrize("ranks", [1, 3])
def test_the_formulas_of_the_all_pairs_objectives_are_what_is_counted(baseline, ranks: int, monkeypatch) -> None:
    monkeypatch.setattr(all_pairs, "BLOCK_NUMBERS", 200)
    monkeypatch.setattr(all_pairs, "padded_to_longest", lambda features, mask, ranks: (features, mask))
    monkeypatch.setattr(all_pairs, "gathered", lambda tensor, ranks: torch.cat([tensor] * ranks))
    step = step_of(baseline(global_weight=0.0), 6, ranks, patches=10, length=7, tokens=5, dim=8)
    with FlopCounterMode(display=False) as counter:
        step()
    sizes = update_step.Sizes(pairs=6, ranks=ranks, patches=10, length=7, tokens=5, dim=8)
    assert counter.get_total_flops() == ALL_PAIRS[baseline](sizes).flops


@pytest.mark.parametrize("baseline", ALL_PAIRS)
@pytest.mark.parametrize(("ranks", "dim", "block"), [(64, 64, 2**14), (64, 64, 2**16), (32, 128, 2**16)])
def test_the_memory_of_the_all_pairs_objectives_is_about_what_is_allocated(
    baseline, ranks: int, dim: int, block: int, monkeypatch
) -> None:
    monkeypatch.setattr(all_pairs, "BLOCK_NUMBERS", block)
    monkeypatch.setattr(all_pairs, "padded_to_longest", lambda features, mask, ranks: (features, mask))
    monkeypatch.setattr(
        all_pairs, "gathered", lambda t, n: torch.cat([t] * n) if t.dtype == torch.bool else Gathered.apply(t, n)
    )
    peak, _ = allocated_bytes(
        step_of(
            baseline(global_weight=0.0), 4, ranks, patches=20, length=33, tokens=8, dim=dim, one_fills_the_context=True
        )
    )
    sizes = update_step.Sizes(pairs=4, ranks=ranks, patches=20, length=33, tokens=8, dim=dim)
    assert peak == pytest.approx(ALL_PAIRS[baseline](sizes).bytes, rel=0.25)


def test_the_formula_of_mgca_is_what_is_counted() -> None:
    with FlopCounterMode(display=False) as counter:
        step_of(MgcaLoss(global_weight=0.0), 6, 1, patches=10, length=7, tokens=5, dim=8)()
    sizes = update_step.Sizes(pairs=6, ranks=1, patches=10, length=7, dim=8)
    assert counter.get_total_flops() == update_step.mgca_cost(sizes, head_dim=3, prototypes=5).flops


@pytest.mark.parametrize("patches", [20, 60])
def test_the_memory_of_mgca_is_about_what_is_allocated(patches: int) -> None:
    peak, _ = allocated_bytes(
        step_of(MgcaLoss(global_weight=0.0), 32, 1, patches=patches, length=20, tokens=20, dim=64)
    )
    sizes = update_step.Sizes(pairs=32, ranks=1, patches=patches, length=20, dim=64)
    assert peak == pytest.approx(update_step.mgca_cost(sizes, head_dim=3, prototypes=5).bytes, rel=0.1)


def test_at_the_papers_sizes_objectives_are_in_the_papers_order() -> None:
    *rows, _ = update_step.update_steps()
    for size, theirs in update_step.PAPER.items():
        ours = [row for row in rows if row["batch_size"] == size and row["objective"] in theirs]
        by_ours = [row["objective"] for row in sorted(ours, key=lambda row: row["tflops"])]
        assert by_ours == sorted(theirs, key=lambda name: theirs[name][0])
