"""What operations cost, of real tensors or of shapes alone.

with Watch() as watch:
    model(pixels)
watch.flops, watch.peak
"""

from __future__ import annotations

import weakref
from functools import cache

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from kd_accel.plan.shapes import operate, storage_of, tensors_in


@cache
def _can_decompose(operation) -> bool:
    return operation._can_decompose()


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
        if _can_decompose(func):  # under inference_mode torch has not done it yet
            with self:
                return func.decompose(*args, **(kwargs or {}))
        result = operate(func, args, kwargs or {})
        if formula := flop_registry.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        self._see(result, (args, kwargs))
        return result

    def _see(self, result, given) -> None:
        """Count the bytes of storages from the operation that makes them until nothing refers to them."""
        made = [storage_of(tensor) for tensor in tensors_in(result)]
        new = {storage._cdata: storage for storage in made if storage._cdata not in self._known}
        if new:  # views, and what is changed in place, are none
            old = {storage_of(tensor)._cdata for tensor in tensors_in(given)}
            for key in new.keys() - old:
                self._add(key, new[key])
        self.peak = max(self.peak, self.held)

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._known.add(key)
        self.held += size
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size
