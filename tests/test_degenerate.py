"""Input with nothing to compare: the loss is worked out by hand and its gradient finite. What is no number shows."""

import pytest
import torch
from implementations import IMPLEMENTATIONS
from strategies import Batch
from torch.testing import assert_close

from sparc_loss.functional import ALIGNMENTS, REDUCTIONS

SCALE = 10.0
EAST, NORTH, ZERO = [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]
DIAGONAL = 0.5**0.5  # cosine of 45 degrees


def contrast(*cosines: list[float]) -> float:
    """Eq. 6 for one caption, given the cosine of every group (row) with every token (column)."""
    logits = SCALE * torch.tensor(cosines, dtype=torch.float64)
    target = torch.arange(len(logits))
    cross_entropies = [torch.nn.functional.cross_entropy(direction, target) for direction in (logits, logits.T)]
    return (sum(cross_entropies) / 2).item()


# Patches and tokens of a single pair, the mask of its tokens, and the loss.
CASES: dict[str, tuple[list, list, list, float]] = {
    "one token and one patch": ([EAST], [NORTH], [1], 0),
    "one token that counts": ([EAST, NORTH], [EAST, NORTH], [0, 1], 0),
    "no token that counts": ([EAST, NORTH], [EAST, NORTH], [0, 0], 0),
    # Every group is the one patch: no token can be told by it.
    "one patch": ([EAST], [EAST, NORTH], [1, 1], contrast([1, 0], [1, 0])),
    "equal patches": ([EAST, EAST, EAST], [EAST, NORTH], [1, 1], contrast([1, 0], [1, 0])),
    # Cosine 0 with everything.
    "an image of zeros": ([ZERO, ZERO], [EAST, NORTH], [1, 1], contrast([0, 0], [0, 0])),
    "captions of zeros": ([EAST, NORTH], [ZERO, ZERO], [1, 1], contrast([0, 0], [0, 0])),
    # All patches are equally similar to it: the same from each.
    "a token of zeros": ([EAST, NORTH], [ZERO, NORTH], [1, 1], contrast([0, DIAGONAL], [0, 1])),
    "equal tokens": ([EAST, NORTH], [EAST, EAST], [1, 1], contrast([1, 1], [1, 1])),
    # The one opposite has similarity -1 to one patch and 0 to the other, which it takes alone.
    "opposite tokens": ([EAST, NORTH], [EAST, [-1.0, 0.0]], [1, 1], contrast([1, -1], [0, 0])),
}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", CASES)
def test_has_the_value_worked_out_by_hand_and_a_finite_gradient(name: str, reduction: str, case: str) -> None:
    *features, mask, expected = CASES[case]
    patches, tokens = (torch.tensor([each], dtype=torch.float64, requires_grad=True) for each in features)
    mask = torch.tensor([mask], dtype=torch.bool)
    loss = IMPLEMENTATIONS[name](patches, tokens, mask, SCALE, reduction=reduction)
    loss.backward()
    assert_close(loss.item(), float(expected), rtol=1e-12, atol=1e-12)
    assert patches.grad.isfinite().all()
    assert tokens.grad.isfinite().all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("reduction", "share"), [("token", 1.0), ("sample", 0.5)])
def test_a_caption_without_a_token_has_no_gradient_and_adds_nothing(name: str, reduction: str, share: float) -> None:
    """By token it is not there; by sample it is a pair whose loss is zero (Eq. 6)."""
    patches = torch.tensor([[EAST, NORTH]] * 2, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([[EAST, NORTH]] * 2, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True], [False, False]])
    loss = IMPLEMENTATIONS[name](patches, tokens, mask, SCALE, reduction=reduction)
    loss.backward()
    assert_close(loss.item(), share * contrast([1, 0], [0, 1]))
    assert (patches.grad[1] == 0).all()
    assert (tokens.grad[1] == 0).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", ["no token that counts", "one token that counts"])
def test_a_loss_of_zero_is_still_attached_to_the_graph(name: str, case: str) -> None:
    """DistributedDataParallel waits for the gradient of every parameter."""
    *features, mask, _ = CASES[case]
    patches, tokens = (torch.tensor([each], requires_grad=True) for each in features)
    scale = torch.tensor(SCALE, requires_grad=True)
    IMPLEMENTATIONS[name](patches, tokens, torch.tensor([mask], dtype=torch.bool), scale).backward()
    assert all((leaf.grad == 0).all() for leaf in (patches, tokens, scale))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("features", ["patch_features", "token_features"])
@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("pair", [0, 1])
def test_nan_and_infinity_in_a_feature_that_counts_show_in_the_loss(
    name: str, value: float, features: str, alignment: str, pair: int
) -> None:
    batch = Batch(
        patch_features=torch.randn(2, 6, 5),
        token_features=torch.randn(2, 4, 5),
        token_mask=torch.tensor([[True] * 4, [False, True, False, False]]),
        alignment=alignment,
    )
    getattr(batch, features)[pair, 1, 2] = value
    assert IMPLEMENTATIONS[name](**vars(batch)).isnan()
