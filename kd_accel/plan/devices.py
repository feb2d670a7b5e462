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


def device(name: str) -> Device:
    """By its name; CPU is this machine, measured."""
    return this_cpu() if name == "CPU" else next(found for found in TABLE if found.name == name)


def this_cpu(size: int = 1024) -> Device:
    """The best of three fp32 matrix products, on one thread of torch's choice of threads."""
    matrix = torch.randn(size, size)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - began)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("CPU", 2 * size**3 / min(seconds), memory)
