"""Running statistics of BatchNorm, which no optimizer holds and no engine synchronises, under every engine."""

from __future__ import annotations

import pytest


@pytest.mark.distributed
@pytest.mark.parametrize(
    "cases",
    [
        ["ddp-fp32", "zero2-bf16"],
        pytest.param(["ddp-bf16", "zero1-fp32", "zero3-fp32", "zero3-bf16"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_saved_statistics_are_exact_and_of_all_ranks(run_ranks, cases):
    """Two ranks: the mean of both, in fp32, which says in eval mode what the engine says; a skipped step is undone,
    a resumed run is exact."""
    run_ranks(["tests/distributed/statistics_worker.py", *cases])
