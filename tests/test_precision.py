"""The loss in low precision, against the float64 value of the same rounded inputs.

Measured by `python tests/test_precision.py` (B = 8, P = 49, L = 16, D = 64, random features; 20 draws, the worst):

    dtype     loss      gradient of patches   gradient of tokens   rounding
    float32   5.7e-07   8.1e-07               8.1e-07              2.7e-08
    bfloat16  5.9e-07   2.5e-03               2.5e-03              1.7e-03
    float16   6.5e-07   3.1e-04               3.2e-04              2.2e-04

Each is the error over the norm of the whole; "rounding" is what the dtype's own rounding makes of the exact gradients.
Similarities, normalisations and sums are float32, so all that a low-precision gradient loses is its last rounding.
"""

from collections.abc import Callable

import pytest
import torch
from implementations import IMPLEMENTATIONS
from strategies import Batch
from torch import Tensor, nn

from sparc_loss import SparcLoss
from sparc_loss.functional import ALIGNMENTS, fine_grained_loss

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEATURES = ("patch_features", "token_features")


def random_batch(seed: int, dtype: torch.dtype, scale: float = 1.0, alignment: str = "sparse") -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        patch_features=(scale * torch.randn(8, 49, 64, generator=generator, dtype=torch.float64)).to(dtype),
        token_features=(scale * torch.randn(8, 16, 64, generator=generator, dtype=torch.float64)).to(dtype),
        token_mask=torch.arange(16) < torch.randint(1, 17, (8, 1), generator=generator),
        logit_scale=20.0,
        alignment=alignment,
    )


def loss_and_gradients(
    batch: Batch, function: Callable[..., Tensor] = fine_grained_loss, autocast: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    batch = batch.with_gradients()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        loss = function(**vars(batch))
    loss.backward()
    return loss.detach(), batch.patch_features.grad, batch.token_features.grad


def in_float64(batch: Batch) -> Batch:
    return batch.but(**{name: getattr(batch, name).double() for name in FEATURES})


def relative_error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


def errors(batch: Batch, function: Callable[..., Tensor] = fine_grained_loss) -> tuple[float, ...]:
    """Relative errors of the loss and of the gradients of patches and tokens; then the rounding of those gradients."""
    dtype = batch.patch_features.dtype
    exact = loss_and_gradients(in_float64(batch))
    rounding = max(relative_error(gradient.to(dtype), gradient) for gradient in exact[1:])
    return *map(relative_error, loss_and_gradients(batch, function), exact), rounding


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_lose_no_more_than_twice_the_rounding_of_their_dtype(
    name: str, alignment: str, dtype: torch.dtype
) -> None:
    for seed in range(3):
        loss, patches, tokens, rounding = errors(random_batch(seed, dtype, alignment=alignment), IMPLEMENTATIONS[name])
        assert loss < 2e-6
        # float32 gradients are sums of thousands of terms: there the rounding of the sums counts, not of the result.
        assert max(patches, tokens) < max(2 * rounding, 1e-5)


# Norms far from 1. What float16 cannot hold, features do not reach.
SCALES = {
    torch.float32: (1e-12, 1e-6, 1e6, 1e15),
    torch.bfloat16: (1e-12, 1e-6, 1e6, 1e15),
    torch.float16: (1e-4, 1e3),
}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("dtype", "scale"), [(dtype, scale) for dtype, scales in SCALES.items() for scale in scales], ids=str
)
@pytest.mark.parametrize("alignment", ["sparse", "dense"])
def test_tiny_and_huge_norms_are_right(name: str, dtype: torch.dtype, scale: float, alignment: str) -> None:
    batch = random_batch(0, dtype, scale, alignment)
    exact = loss_and_gradients(in_float64(batch))
    loss, *gradients = loss_and_gradients(batch, IMPLEMENTATIONS[name])
    assert relative_error(loss, exact[0]) < 1e-5
    for gradient, expected in zip(gradients, exact[1:], strict=True):
        assert gradient.isfinite().all()
        rounded = expected.to(dtype).double()
        if rounded.norm() > 100 * expected.numel() ** 0.5 * torch.finfo(dtype).smallest_normal:
            assert relative_error(gradient, expected) < max(2 * relative_error(rounded, expected), 1e-4)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("features", [FEATURES, *((each,) for each in FEATURES)], ids=str)
@pytest.mark.parametrize("scale", [1e-25, 1e-40])
def test_vectors_whose_squares_vanish_in_float32_give_a_finite_loss(
    name: str, features: tuple[str, ...], scale: float
) -> None:
    batch = random_batch(0, torch.float32)
    tiny = batch.but(**{each: getattr(batch, each) * scale for each in features})
    loss = IMPLEMENTATIONS[name](**vars(tiny))
    assert loss.isfinite()
    torch.testing.assert_close(loss, tiny.loss(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_not_reach_into_the_loss(name: str, dtype: torch.dtype, autocast: torch.dtype) -> None:
    batch, function = random_batch(0, dtype), IMPLEMENTATIONS[name]
    expected, found = loss_and_gradients(batch, function), loss_and_gradients(batch, function, autocast)
    assert found[0].dtype == torch.promote_types(dtype, torch.float32)
    assert all(torch.equal(value, other) for value, other in zip(found, expected, strict=True))


class TwoMaps(nn.Module):
    """Patches and tokens, each through a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, patches: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        patches, tokens = self.image(patches), self.text(tokens)
        return {
            "image_features": nn.functional.normalize(patches.mean(dim=1), dim=-1),
            "text_features": nn.functional.normalize(tokens.mean(dim=1), dim=-1),
            "patch_features": patches,
            "token_features": tokens,
        }


def test_a_grad_scaler_steps_as_training_without_one() -> None:
    inputs = torch.randn(4, 9, 8), torch.randn(4, 5, 8)
    mask = torch.arange(5) < torch.tensor([[5], [1], [0], [3]])
    weights = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = TwoMaps()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
        for _ in range(3):
            with torch.autocast("cpu", dtype=torch.float16):
                output = model(*inputs)
                loss = SparcLoss()(**output, token_mask=mask, logit_scale=torch.tensor(10.0))
            assert loss.dtype == torch.float32
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        weights.append([parameter.detach() for parameter in model.parameters()])
        if enabled:
            assert scaler.get_scale() == 2.0**10  # no step was skipped
    for plain, scaled in zip(*weights, strict=True):
        # Scaled up, small float16 gradients keep digits that they lose without.
        torch.testing.assert_close(scaled, plain, rtol=1e-2, atol=1e-3)


def measured_table() -> str:
    """The rows of the table above."""
    rows = []
    for dtype in DTYPES:
        worst = [
            max(column) for column in zip(*(errors(random_batch(seed, dtype)) for seed in range(20)), strict=True)
        ]
        loss, patches, tokens, rounding = (f"{value:.1e}" for value in worst)
        rows.append(f"    {str(dtype)[6:]:<9} {loss:<9} {patches:<21} {tokens:<20} {rounding}")
    return "\n".join(rows)


if __name__ == "__main__":
    print(measured_table())
