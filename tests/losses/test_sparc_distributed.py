"""Two real processes under DistributedDataParallel do what one process does on the whole batch."""

from itertools import product

import pytest
from ranks import run_ranks
from torch import Tensor
from torch.testing import assert_close
from toy_training import LENGTHS, train_every_way, train_step, whole_batch

WORLD_SIZE = 2
# SigLipLoss knows no local_loss.
LOSSES = [("ClipLoss", False), ("ClipLoss", True), ("SigLipLoss", False)]
SETTINGS = {
    f"{lengths}, {loss}{', local_loss' if local_loss else ''}, {reduction}": (lengths, loss, reduction, local_loss)
    for lengths, (loss, local_loss), reduction in product(LENGTHS, LOSSES, ("token", "sample"))
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """For each rank, what it made of each setting."""
    return run_ranks(train_every_way, WORLD_SIZE, tmp_path_factory.mktemp("ranks"), SETTINGS)


@pytest.mark.parametrize("setting", SETTINGS)
def test_two_ranks_equal_one_process(ranks: list, setting: str) -> None:
    lengths, *options = SETTINGS[setting]
    expected = train_step(whole_batch(LENGTHS[lengths]), *options)
    results = [result[setting] for result in ranks]

    mean_loss = sum(result["loss"] for result in results) / WORLD_SIZE
    assert_close(mean_loss, expected.pop("loss"), rtol=1e-10, atol=1e-10)
    for name, gradient in expected.items():
        for result in results:
            assert_close(result[name], gradient, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
