"""Two real processes under DistributedDataParallel do what one process does on the whole batch."""

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from torch.testing import assert_close
from toy_baselines import baseline_step, step_every_way
from toy_training import LENGTHS

pytestmark = pytest.mark.slow

WORLD_SIZE = 2
OPTIONS = {
    "FilipLoss": {"token_dropping": 0.0, "global_weight": 0.5},
    "PaclLoss": {"global_weight": 0.5},
    "GloriaLoss": {},
    "MgcaLoss": {},
    "FlairLoss": {},
}
SETTINGS = {f"{name}, {lengths}": (name, lengths, OPTIONS[name], "") for name in OPTIONS for lengths in LENGTHS}
LENGTH = "very different lengths"
SETTINGS |= {
    # Without the global half: the toy model's pooled features would see the padding.
    f"{name}, fewer patches on a rank": (name, LENGTH, {**OPTIONS[name], "global_weight": 0.0}, "patches")
    for name in ("FilipLoss", "PaclLoss", "GloriaLoss", "FlairLoss")
}
SETTINGS |= {
    f"{name}, shorter captions on a rank": (name, LENGTH, {**OPTIONS[name], "global_weight": 0.0}, "tokens")
    for name in ("FilipLoss", "GloriaLoss")
}
SETTINGS |= {
    f"{name}, {options}": (name, LENGTH, options, "")
    for name, options in [
        ("FilipLoss", {"token_dropping": 0.0, "local_loss": True, "global_weight": 1.0}),
        ("MgcaLoss", {"fine_grained_weight": 0.0}),
        ("MgcaLoss", {"prototype_weight": 0.0, "fine_grained_scale": 3.0}),
        ("MgcaLoss", {"global_weight": 0.0}),
        ("FlairLoss", {"fine_grained_weight": 0.0}),
        ("FlairLoss", {"fine_grained_scale": 3.0}),
    ]
}
DROPPING = {"FilipLoss, dropping": ("FilipLoss", LENGTH, {"token_dropping": 0.5}, "")}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """For each rank, what it made of each setting."""
    return run_ranks(step_every_way, WORLD_SIZE, tmp_path_factory.mktemp("ranks"), SETTINGS | DROPPING)


@pytest.mark.parametrize("setting", SETTINGS)
def test_two_ranks_equal_one_process(ranks: list, setting: str) -> None:
    expected = baseline_step(*SETTINGS[setting])
    results = [result[setting] for result in ranks]

    mean_loss = sum(result["loss"] for result in results) / WORLD_SIZE
    assert_close(mean_loss, expected.pop("loss"), rtol=1e-10, atol=1e-10)
    for name, gradient in expected.items():
        for result in results:
            assert_close(result[name], gradient, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_each_rank_drops_tokens_of_its_own_pairs_and_both_see_the_same(ranks: list) -> None:
    name = next(iter(DROPPING))
    first, second = (result[name]["loss"] for result in ranks)
    assert torch.equal(first, second)
    assert first != baseline_step("FilipLoss", LENGTH, {"token_dropping": 0.0})["loss"]
