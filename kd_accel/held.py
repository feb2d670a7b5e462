"""The student's fp32 state on its way to a checkpoint: copied in parts while training waits, made whole beside it.

    held = engine.masters.held(memory)       # every rank copies what it holds, and sends nothing
    state = whole(held, group)               # in any thread: rank 0 has it by parameter name

Under ZeRO a rank holds a W-th of every moment, so that W ranks wait a W-th as long.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kd_accel import distributed

WEIGHT = "weight"  # what is held of a parameter beside its moments


class Part(NamedTuple):
    """Some consecutive numbers of a flattened tensor."""

    key: str  # WEIGHT, or which moment
    name: str  # of the parameter
    start: int
    size: int


@dataclass(frozen=True)
class Held:
    """What one rank holds, in memory that training no longer touches."""

    step: int  # optimizer steps applied
    shapes: dict[str, torch.Size]  # of every trained parameter
    parts: list[Part]
    values: Tensor  # [n] fp32 on the CPU: those of the parts, one behind the other
    untrained: dict[str, Tensor]  # on rank 0: frozen weights and buffers by name, whole


class HostMemory:
    """fp32 memory for one copy at a time, page-locked beside a GPU; the next copy takes its place."""

    def __init__(self):
        self._flat = torch.empty(0)

    def copy(self, tensors: Iterable[Tensor], size: int) -> Tensor:
        """`tensors`, of at most `size` numbers together, one behind the other: [n] fp32."""
        on_gpu = torch.cuda.is_available()
        if len(self._flat) < size:
            self._flat = torch.empty(size, pin_memory=on_gpu)
        end = 0
        for tensor in tensors:
            start, end = end, end + tensor.numel()
            self._flat[start:end].copy_(tensor.detach().flatten(), non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()
        return self._flat[:end]


def whole(held: Held, group=None) -> dict[str, dict[str, Tensor]]:
    """On rank 0 WEIGHT or moment -> parameter name -> fp32 tensor, {} elsewhere; collective in `group`.

    A tensor that this rank holds whole is not copied: it lies where `held` does.
    """
    found: dict[str, dict[str, Tensor]] = {}
    filled: dict[tuple[str, str], int] = {}
    for parts, values in distributed.to_main(held.parts, held.values, group=group):
        for part, piece in zip(parts, values.split([part.size for part in parts]), strict=True):
            tensors, shape = found.setdefault(part.key, {}), held.shapes[part.name]
            filled[part.key, part.name] = filled.get((part.key, part.name), 0) + part.size
            if part.size == shape.numel():
                tensors[part.name] = piece.view(shape)
                continue
            if part.name not in tensors:
                tensors[part.name] = torch.empty(shape)
            tensors[part.name].view(-1)[part.start : part.start + part.size] = piece
    short = [place for place, size in filled.items() if size != held.shapes[place[1]].numel()]
    assert not short, f"no rank holds all of {short}"
    return found
