"""What a device can do: dense bf16 matrix products without sparsity, and memory, from the makers' data sheets."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    name: str
    flops: float  # per second
    memory: int  # bytes


TABLE = (
    Device("A100", 312e12, 80 * 2**30),
    Device("H100", 989e12, 80 * 2**30),
    Device("H200", 989e12, 141 * 2**30),
    Device("L40S", 362e12, 48 * 2**30),
)


def this_device(where: torch.device, *, bf16: bool) -> Device:
    """A GPU of the table by its name; another one, and the CPU, measured: in fp32, with `bf16` also in that."""
    if where.type == "cuda":
        name, memory = torch.cuda.get_device_name(where), torch.cuda.get_device_properties(where).total_memory
        known = next((found for found in TABLE if found.name in name), None)
        return known or Device(name, _matmul_flops(where, torch.bfloat16, 8192), memory)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    dtypes = (torch.float32, torch.bfloat16)[: 1 + bf16]  # few CPUs have units for the second
    return Device("CPU", max(_matmul_flops(where, dtype, 1024) for dtype in dtypes), memory)


def _matmul_flops(where: torch.device, dtype: torch.dtype, size: int) -> float:
    """Per second, of the best of a few square products; on a CPU by as many threads as torch uses."""
    matrix = torch.randn(size, size, device=where, dtype=dtype)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        product = matrix @ matrix
        product[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)
