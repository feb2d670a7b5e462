"""Models without memory: torch's fake tensors have shapes and types, run every operation, and hold no numbers.

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

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ASKS_WHERE = torch.ops.prim.device.default


@contextmanager
def shapes_only() -> Iterator[None]:
    """Tensors made inside take no memory. Whoever asks for a number gets a 1."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operation, whose FLOPs nobody counts
    try:
        with _Ones(allow_non_fake_inputs=True):
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
        if func is ASKS_WHERE:
            return func(*args, **(kwargs or {}))
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
                self._add(key, new[key].untyped_storage())
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


class _Ones(FakeTensorMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        if func is ASKS_WHERE and not self.in_kernel_invocation:  # two of three calls, and torch's own way is long
            return args[0].fake_device
        return super().__torch_dispatch__(func, types, args, kwargs)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
