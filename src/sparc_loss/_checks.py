"""Checks of arguments: each raises one error that names the argument, what was found and what was expected."""

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} is {value!r}; expected one of {expected}")


def check_number(name: str, value: float, minimum: float, maximum: float = float("inf")) -> None:
    """Raise TypeError unless `value` is a real number, ValueError unless it is finite and in [minimum, maximum]."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); expected a number")
    # Not math.isfinite, which breaks the graph of torch.compile if a setting is a dynamic float.
    if not (minimum <= value <= maximum and value < float("inf")):
        expected = f"of at least {minimum}" if maximum == float("inf") else f"between {minimum} and {maximum}"
        number = "number" if math.isfinite(value) else "finite number"
        raise ValueError(f"{name} is {value}; expected a {number} {expected}")


def check_positive(name: str, value: float) -> None:
    """Raise TypeError unless `value` is a real number, ValueError unless it is finite and above 0."""
    if isinstance(value, Real) and not isinstance(value, bool) and not 0 < value < float("inf"):
        finite = "" if math.isfinite(value) else "finite "
        raise ValueError(f"{name} is {value}; expected a {finite}number above 0")
    check_number(name, value, 0)


def check_whole_number(name: str, value: int, minimum: int) -> None:
    """Raise TypeError unless `value` is a whole number, also numpy's, ValueError unless it is at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); expected a whole number")
    if value < minimum:
        raise ValueError(f"{name} is {value}; expected a whole number of at least {minimum}")


def check_features(shapes: str, **features: Tensor) -> None:
    """Check floating-point tensors against `shapes`, one comma-separated symbolic shape per tensor.

    `check_features("b p d, b l d", patch_features=v, token_features=t)` requires two tensors of rank 3 whose
    first and last sizes agree, on one device. P and D, the numbers of patches and of features, are at least 1.

    Raises:
        TypeError: a value is not a tensor of a floating-point dtype.
        ValueError: a tensor has another rank, a size that disagrees, no patch or feature, or is on another device.
    """
    sizes: dict[str, tuple[int, str]] = {}
    first_name, first_device = None, None
    for (name, tensor), shape in zip(features.items(), shapes.split(","), strict=True):
        axes = shape.split()
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor {_spelled(axes)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected a floating-point tensor {_spelled(axes)}")
        _check_shape(name, tensor, axes, sizes)
        if first_device is None:
            first_name, first_device = name, tensor.device
        elif tensor.device != first_device:
            raise ValueError(f"{name} is on {tensor.device} and {first_name} on {first_device}; expected one device")


def check_scale(logit_scale: Tensor | float) -> None:
    """Raise TypeError unless it is a number or a tensor, ValueError unless a tensor has exactly one element."""
    if isinstance(logit_scale, bool) or not isinstance(logit_scale, (Tensor, Real)):
        found = f"{logit_scale!r} ({type(logit_scale).__name__})"
        raise TypeError(f"logit_scale is {found}; expected a number or a tensor of one element, 1/tau")
    if isinstance(logit_scale, Tensor) and logit_scale.numel() != 1:
        raise ValueError(f"logit_scale has shape {list(logit_scale.shape)}; expected one element, 1/tau")


def check_mask(name: str, mask: Tensor, shape: Sequence[int], axes: str, device: torch.device) -> None:
    """Check a boolean mask; `axes` is `shape` in letters, for the message.

    Raises:
        TypeError: it is not a tensor, or its dtype is not torch.bool.
        ValueError: it has another shape or device.
    """
    # Format messages only for an error: formatting a dynamic size breaks the graph of torch.compile.
    if not isinstance(mask, Tensor):
        expected = f"{_spelled(axes.split())} = {list(shape)}"
        raise TypeError(f"{name} is a {type(mask).__name__}; expected a bool tensor {expected}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} has dtype {mask.dtype}; expected torch.bool, True where valid")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {list(mask.shape)}; expected {_spelled(axes.split())} = {list(shape)}")
    if mask.device != device:
        raise ValueError(f"{name} is on {mask.device} and the features on {device}; expected one device")


def _check_shape(name: str, tensor: Tensor, axes: Sequence[str], sizes: dict[str, tuple[int, str]]) -> None:
    if tensor.ndim != len(axes):
        raise ValueError(f"{name} has shape {list(tensor.shape)}; expected rank {len(axes)}, {_spelled(axes)}")
    for axis, size in zip(axes, tensor.shape, strict=True):
        if size == 0 and axis in ("p", "d"):
            raise ValueError(f"{name} has {axis.upper()} = 0 in shape {list(tensor.shape)}; expected at least 1")
        known_size, known_name = sizes.setdefault(axis, (size, name))
        if size != known_size:
            raise ValueError(
                f"{name} has {axis.upper()} = {size} in shape {list(tensor.shape)}, "
                f"{known_name} has {axis.upper()} = {known_size}; expected the same"
            )


def _spelled(axes: Sequence[str]) -> str:
    """["b", "p"] as "[B, P]"."""
    return "[" + ", ".join(axis.upper() for axis in axes) + "]"
