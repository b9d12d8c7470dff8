"""Batches for the baselines, and how they are held against their slow references."""

from collections.abc import Callable

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

FEATURES = ("image_features", "text_features", "patch_features", "token_features", "logit_scale")


def random_outputs(
    batch: int = 3, patches: int = 4, length: int = 5, dim: int = 6, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """What a surfaced model returns, every feature a leaf with a gradient; captions of different lengths."""
    outputs = {
        "image_features": F.normalize(torch.randn(batch, dim, dtype=dtype), dim=-1),
        "text_features": F.normalize(torch.randn(batch, dim, dtype=dtype), dim=-1),
        "patch_features": torch.randn(batch, patches, dim, dtype=dtype),
        "token_features": torch.randn(batch, length, dim, dtype=dtype),
        "logit_scale": torch.tensor(10.0, dtype=dtype),
    }
    outputs = {name: value.requires_grad_() for name, value in outputs.items()}
    number = length - torch.arange(batch)[:, None] % length
    return {**outputs, "token_mask": torch.arange(length) < number}


@st.composite
def baseline_outputs(draw: st.DrawFn, zero_vectors: bool = False) -> dict[str, Tensor]:
    """Sizes 1 to 4, masks with holes and empty rows; if asked for, a few features are zero vectors."""
    size = st.integers(1, 4)
    batch, patches, length, dim = draw(size), draw(size), draw(size), draw(size)
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    outputs = random_outputs(batch, patches, length, dim)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    share = draw(st.sampled_from([0.5, 0.8, 1.0]))
    outputs["token_mask"] = torch.from_numpy(rng.random((batch, length)) < share)
    if draw(st.booleans()):
        outputs["patch_mask"] = torch.from_numpy(rng.random((batch, patches)) < share)
    if zero_vectors:
        with torch.no_grad():
            for name in ("patch_features", "token_features"):
                outputs[name][torch.from_numpy(rng.random(outputs[name].shape[:2]) < 0.3)] = 0
    return outputs


def assert_same_value_and_gradient(
    loss: Callable[[dict[str, Tensor]], Tensor], reference: Callable[[dict[str, Tensor]], Tensor], outputs: dict
) -> None:
    """To 1e-9, with respect to every feature and the scale; what the reference does not use has gradient 0."""
    inputs = [outputs[name] for name in FEATURES]
    actual, expected = loss(outputs), reference(outputs)
    assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    actual_gradients = torch.autograd.grad(actual, inputs, materialize_grads=True)
    if expected.requires_grad:
        expected_gradients = torch.autograd.grad(expected, inputs, materialize_grads=True)
    else:
        expected_gradients = [torch.zeros_like(each) for each in inputs]
    for name, one, other in zip(FEATURES, actual_gradients, expected_gradients, strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
