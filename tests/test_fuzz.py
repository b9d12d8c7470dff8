"""The short form of `make fuzz`."""

import pytest
import torch
from fuzz import TOLERANCES, fuzz, main
from implementations import IMPLEMENTATIONS
from torch import Tensor

from sparc_loss.functional import fine_grained_loss

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_random_cases_equal_the_slow_reference_in_every_dtype(name: str) -> None:
    worst, counts = fuzz(1000, IMPLEMENTATIONS[name])
    assert counts["left out"] < 50
    assert worst.keys() == TOLERANCES.keys()
    assert all(error < TOLERANCES[dtype] for dtype, error in worst.items()), worst


def test_the_command_reports_the_worst_error_of_every_implementation_and_dtype(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["fuzz", "--cases", "40"])
    assert main() == 0
    report = capsys.readouterr().out
    assert report.count("worst error") == len(IMPLEMENTATIONS) * len(TOLERANCES)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_small_mistake_is_found(dtype: torch.dtype) -> None:
    def with_every_token(*, token_mask: Tensor, **others: object) -> Tensor:
        return fine_grained_loss(token_mask=torch.ones_like(token_mask), **others)

    worst, _ = fuzz(200, with_every_token)
    assert worst[dtype] > 0.01
