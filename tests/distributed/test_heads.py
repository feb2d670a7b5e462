"""Heads and the masked view, whose tower runs twice in a pass, under every engine."""

from __future__ import annotations

import pytest


@pytest.mark.distributed
@pytest.mark.parametrize(
    "cases",
    [
        ["ddp-fp32", "zero2-bf16"],
        pytest.param(["zero1-fp32", "zero3-fp32", "zero3-bf16"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_two_ranks_give_what_the_student_gives_alone(run_ranks, tiny_teacher, cases):
    """Features, and the sum over ranks of every gradient, in fp32; names and widths, and the step, in bf16 too."""
    run_ranks(["tests/distributed/heads_worker.py", str(tiny_teacher), *cases])
