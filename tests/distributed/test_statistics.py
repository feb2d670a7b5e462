"""Running statistics of BatchNorm, which no optimizer holds and no engine synchronises, under every engine."""

from __future__ import annotations

import pytest
from marks import slow_but


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("engine", "precision"),
    slow_but(
        [("ddp", "fp32"), ("zero2", "bf16")],
        [("ddp", "fp32"), ("ddp", "bf16"), ("zero1", "fp32"), ("zero2", "bf16"), ("zero3", "fp32"), ("zero3", "bf16")],
    ),
)
def test_saved_statistics_are_exact_and_of_all_ranks(run_ranks, engine, precision):
    """Two ranks: the mean of both, in fp32, which says in eval mode what the engine says; a skipped step is undone,
    a resumed run is exact."""
    run_ranks(["tests/distributed/statistics_worker.py", engine, precision])
