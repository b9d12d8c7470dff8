"""The benchmark measures what it says, and its deterministic figures keep within their bounds."""

import json
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

pytestmark = pytest.mark.slow

WHOLE = (256, 196, 77, 512)


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    from examples import benchmark

    return benchmark


# What must hold, at the benchmark's own shapes


def test_flops_are_within_a_fifth_of_the_valid_tokens_and_a_fifth_of_the_listings(benchmark: ModuleType) -> None:
    batch = benchmark.make_batch(WHOLE, torch.float32)
    numbers = batch.token_mask.sum(dim=1)
    assert 16 <= numbers.float().mean() <= 17
    assert numbers.max() == 77
    minimum = 512 * (12 * 196 * numbers.sum() + 6 * numbers.square().sum()).item()
    ours = benchmark.count_flops(benchmark.fused_loss, batch)
    assert minimum <= ours <= 1.2 * minimum
    listing = benchmark.count_flops(benchmark.listing_loss, benchmark.make_batch(WHOLE, torch.float32, "meta"))
    assert ours <= listing / 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("patches", [196, 49])
def test_memory_is_the_gradients_and_little_more(benchmark: ModuleType, patches: int, dtype: torch.dtype) -> None:
    batch = benchmark.make_batch((256, patches, 77, 512), dtype)
    gradients = sum(each.nbytes for each in (batch.patch_features, batch.token_features))
    peak, _ = benchmark.allocated_bytes(lambda: benchmark.step(benchmark.fused_loss, batch))
    assert gradients < peak <= 1.25 * gradients
    # The workspace keeps its bound; beside it, the positions of the tokens: two int64 for each.
    assert peak <= gradients + 8 * 2**20 + 3 * 8 * batch.token_mask.numel()


def test_autograd_saves_nothing_beyond_the_inputs(benchmark: ModuleType) -> None:
    batch = benchmark.make_batch((64, 49, 77, 64), torch.float32)
    assert benchmark.saved_bytes(benchmark.fused_loss, batch) == 0
    assert benchmark.saved_bytes(benchmark.listing_loss, batch) > 10 * batch.token_mask.numel() * 4


def test_between_forward_and_backward_the_gradients_are_held_or_with_recompute_nothing(benchmark: ModuleType) -> None:
    batch = benchmark.make_batch((64, 49, 77, 64), torch.float32)
    gradients = sum(each.nbytes for each in (batch.patch_features, batch.token_features))
    _, held = benchmark.allocated_bytes(lambda: benchmark.fused_loss(batch))
    assert gradients <= held <= gradients + 1000
    _, held = benchmark.allocated_bytes(lambda: benchmark.fused_loss(batch, recompute=True))
    assert held <= 1000


# What the benchmark compares and counts


def test_the_listing_is_the_same_loss(benchmark: ModuleType) -> None:
    batch = benchmark.make_batch((8, 16, 12, 32), torch.float64)
    losses = [loss(batch) for loss in (benchmark.listing_loss, benchmark.eager_loss, benchmark.fused_loss)]
    assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    assert_close(losses[2], losses[1], rtol=1e-12, atol=0)


def test_the_matrix_products_are_those_of_valid_tokens(benchmark: ModuleType) -> None:
    batch = benchmark.make_batch((8, 16, 12, 32), torch.float32)
    assert benchmark.count_flops(benchmark.matrix_products, batch) == 12 * batch.token_mask.sum() * 16 * 32


def test_allocated_bytes_are_peak_and_kept(benchmark: ModuleType) -> None:
    def action() -> Tensor:
        torch.empty(3000, dtype=torch.uint8)
        return torch.cat([torch.empty(1000, dtype=torch.uint8), torch.empty(1000, dtype=torch.uint8)])

    peak, kept = benchmark.allocated_bytes(action)
    assert 4000 <= peak < 4500
    assert 2000 <= kept < 2500


# The command


def test_what_takes_long_is_measured_in_three_rounds(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = benchmark.make_batch((2, 9, 12, 16), torch.float32)

    def slow(batch: Tensor) -> Tensor:
        time.sleep(0.2)
        return benchmark.fused_loss(batch)

    monkeypatch.setattr(benchmark, "LONGEST", 0.5)
    seconds = benchmark.times({"fused": benchmark.fused_loss, "slow": slow}, batch, repeats=6)
    assert {name: len(each) for name, each in seconds.items()} == {"fused": 6, "slow": 3}


def test_quick_prints_its_tables_and_writes_figures_and_plot(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    benchmark.main(["--quick", "--device", "cpu", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed
    assert "threads 1" in printed
    assert "B=4 P=9 L=12 D=16 float32" in printed
    assert "One update step of ViT-B-16" in printed
    results = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))
    names = ["fused", "fused, recompute", "eager", "listing", "ClipLoss", "3 image negatives", "3, both directions"]
    names += ["3, highest patches", "7, highest patches", "matrix products"]
    assert [row["implementation"] for row in results["losses"]] == names
    assert all(low <= median <= high for low, median, high in (row["seconds"] for row in results["losses"]))
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["64,196,77", "1,2,3,0"])
def test_what_is_no_shape_is_refused(benchmark: ModuleType, text: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        benchmark.parse(["--shapes", text])
    assert f"'{text}' is no shape; expected B,P,L,D such as 64,196,77,512" in capsys.readouterr().err
