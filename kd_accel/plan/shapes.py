"""Models without memory: tensors with shapes and types that run every operation, and hold no numbers.

with shapes_only():
    model = build()
    with Watch() as watch:
        model(pixels)
watch.flops, watch.peak
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from torch.utils.flop_counter import flop_registry

META = torch.device("meta")


@contextmanager
def shapes_only() -> Iterator[None]:
    """Tensors made inside take no memory. Whoever asks for a number gets a 1.

    torch's FakeTensorMode does the same, and more that is not needed here, in ten times as long.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operation, whose FLOPs nobody counts
    try:
        with _Shapes():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


class Watch(TorchDispatchMode):
    """What happens inside: floating point operations, and bytes of the tensors that come to be.

    flops   two per multiplication and addition of matrix products, convolutions, attention
    held    bytes of those that are still there
    peak    the most that were there at a time

    The formulas are those of torch's FlopCounterMode, which itself takes as long as everything else together.
    """

    def __init__(self):
        super().__init__()
        self.flops = self.held = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._can_decompose():  # under inference_mode torch has not done it yet
            with self:
                return func.decompose(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        self._see(result, (args, kwargs))
        return result

    def _see(self, result, given) -> None:
        """Count the bytes of storages from the operation that makes them until nothing refers to them."""
        new = {_storage(tensor): tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)}
        new = {key: tensor for key, tensor in new.items() if key not in self._known}
        if new:  # views, and what is changed in place, are none
            old = {_storage(tensor) for tensor in tree_leaves(given) if isinstance(tensor, Tensor)}
            for key in new.keys() - old:
                self._add(key, _bytes_of(new[key]))
        self.peak = max(self.peak, self.held)

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._known.add(key)
        self.held += size
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """As module.to(dtype), which cannot swap fake parameters."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.to(dtype), requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                part._buffers[name] = buffer.to(dtype)


class _Shape(Tensor):
    """A CPU tensor to all who ask, autocast and autograd among them; `meta`, a meta tensor, knows its storage."""

    meta: Tensor

    @staticmethod
    def __new__(cls, meta: Tensor):
        known = {"strides": meta.stride(), "storage_offset": meta.storage_offset(), "dtype": meta.dtype}
        shape = Tensor._make_wrapper_subclass(cls, meta.shape, **known, device="cpu")
        shape.meta = meta
        return shape

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Shapes(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


@dataclass(frozen=True, slots=True)
class _Layout:
    """What torch.empty_strided wants to know."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


_results: dict[tuple, Any] = {}  # layouts by operation and arguments: many meta kernels are slow Python


def _run(operation, args, kwargs):
    """On meta tensors."""
    if operation is torch.ops.aten._local_scalar_dense.default:
        return 1.0 if args[0].is_floating_point() else 1
    leaves, structure = tree_flatten((args, kwargs))
    given = {id(leaf.meta): leaf for leaf in leaves if isinstance(leaf, _Shape)}
    leaves = [_on_meta(leaf) for leaf in leaves]

    def results():
        args, kwargs = tree_unflatten(leaves, structure)
        where = {"device": META} if _takes_device(operation) and not given else {}
        return operation(*args, **kwargs | where)

    if _changes_or_views(operation):
        return tree_map_only(Tensor, lambda made: given[id(made)] if id(made) in given else _Shape(made), results())
    key = operation, structure, *(_layout(x) if isinstance(x, Tensor) else (type(x), x) for x in leaves)
    if key not in _results:
        _results[key] = tree_map_only(Tensor, _layout, results())
    return tree_map_only(_Layout, _empty, _results[key])


def _on_meta(value: Any) -> Any:
    if isinstance(value, _Shape):
        return value.meta
    if isinstance(value, Tensor):
        return value.to(META)
    return META if isinstance(value, torch.device) else value


def _layout(tensor: Tensor) -> _Layout:
    return _Layout(tensor.shape, tensor.stride(), tensor.dtype)


def _empty(layout: _Layout) -> _Shape:
    return _Shape(torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype, device=META))


@cache
def _takes_device(operation) -> bool:
    return any(argument.name == "device" for argument in operation._schema.arguments)


@cache
def _changes_or_views(operation) -> bool:
    """What it is given."""
    return any(argument.alias_info is not None for argument in operation._schema.arguments)


def _storage(tensor: Tensor) -> int:
    return _bytes_of(tensor)._cdata


def _bytes_of(tensor: Tensor) -> torch.UntypedStorage:
    return (tensor.meta if isinstance(tensor, _Shape) else tensor).untyped_storage()
