"""What makes a second forward pass repeat the first, beside the state of the random generators.

Exact accumulation looks at every micro-batch twice (GradCache, arXiv 2101.06983): once without a graph for the
features, once with one for the gradients. Dropout, drop-path and patch dropout must drop the same in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

TOLERANCE = 0.02  # of the largest feature: kernels of some GPUs add up in another order each time


@contextmanager
def unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """Running statistics move in one of the two passes only: on leaving, buffers are what they were on entering."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    yield
    with torch.no_grad():
        for buffer, value in before:
            buffer.copy_(value)


def check_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Raises RuntimeError when the two passes saw different features, [b, d] by name: gradients would be wrong."""
    for name, rows in first.items():
        size, apart = rows.abs().max(), (rows - second[name]).abs().max()
        if not apart <= TOLERANCE * size:  # a nan is not the same either
            raise RuntimeError(
                f"train.accumulate: the second pass gave {name} features up to {apart:.3g} away from the first (they"
                f" are as large as {size:.3g}): a layer draws random numbers that torch's generators do not give, or"
                " counts its calls; use train.accumulate=1 with it"
            )
