"""A device that is not the CPU, pretended: values are computed on the CPU, and what makes the host wait is counted.

A `Pretended` tensor says that it is on the device "meta" (a CUDA tensor would ask a driver) and holds a CPU tensor.
As on CUDA, it does not mix with CPU tensors, but for those of no dimension. Within `pretended_device` tensors are also
made there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
aten = torch.ops.aten
# Their results, or the shapes of their results, are read from the device.
WAITING = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.unique_dim,
    aten._unique2,
    aten.unique_consecutive,
    aten.equal,
    aten.is_nonzero,
    aten.bincount,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


class Pretended(Tensor):
    """A tensor on the pretended device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Pretended":
        wrapper = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=held.requires_grad,
        )
        wrapper.held = held.detach()
        return wrapper

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Pretended({self.held!r})"

    def __init__(self, held: Tensor) -> None:
        pass

    def tolist(self) -> Any:
        """As CUDA does it; torch has none for subclasses."""
        return self.cpu().tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {}, [])


class _Device(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {}, self.waits)


@contextmanager
def pretended_device() -> Iterator[list[str]]:
    """Compute on the pretended device; gives the names of the operators that made the host wait, in their order."""
    with _Device() as device:
        yield device.waits


def on_device(tensor: Tensor) -> Tensor:
    """A copy of the tensor on the pretended device, a leaf."""
    return Pretended(tensor.detach().clone()).requires_grad_(tensor.requires_grad)


def held(tensor: Tensor) -> Tensor:
    """The values of a tensor on the device, on the CPU, without counting."""
    assert isinstance(tensor, Pretended), f"a {type(tensor).__name__} on {tensor.device}"
    return tensor.held


def _computed(func: Any, args: Any, kwargs: dict[str, Any], waits: list[str]) -> Any:
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    ours = [each for each in tensors if isinstance(each, Pretended)]
    there = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    copies = func.overloadpacket is aten.copy_
    moves = copies or (func.overloadpacket is aten._to_copy and there is not None)
    if not ours and there != DEVICE:
        return func(*args, **kwargs)
    if ours and not moves and there in (None, DEVICE):
        # CUDA fetches indices from the CPU by itself.
        mixed = tree_leaves(args[0]) if func.overloadpacket in INDEXING else tensors
        others = [each for each in mixed if not isinstance(each, Pretended) and each.ndim]
        if others:
            raise RuntimeError(f"{func} of tensors on two devices, {DEVICE} and {others[0].device}")
    if _waits(func, args, there, kwargs):
        waits.append(str(func))

    def taken(each: Any) -> Any:
        return each.held if isinstance(each, Pretended) else each

    given = {**kwargs, "device": torch.device("cpu")} if there is not None else kwargs
    result = func(*tree_map(taken, args), **tree_map(taken, given))
    if (there is not None and there != DEVICE) or (copies and not isinstance(args[0], Pretended)):
        return result
    wrapped = tree_map(lambda each: Pretended(each) if isinstance(each, Tensor) else each, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _waits(func: Any, args: Any, there: torch.device | None, kwargs: dict[str, Any]) -> bool:
    packet = func.overloadpacket
    if packet in WAITING:
        return True
    if packet in INDEXING:
        indices = [each for each in args[1] if each is not None]
        return any(each.dtype in (torch.bool, torch.uint8) or not isinstance(each, Pretended) for each in indices)
    if packet is aten.repeat_interleave:
        return kwargs.get("output_size") is None
    if packet is aten.copy_:
        between = len({isinstance(each, Pretended) for each in args[:2]}) == 2
        return between and not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    if packet is aten._to_copy and there is not None:
        # To the CPU the host waits for the values; from there, for the copy, unless told not to.
        return (there != DEVICE) or not (kwargs.get("non_blocking") or isinstance(args[0], Pretended))
    return False
