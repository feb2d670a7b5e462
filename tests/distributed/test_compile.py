"""Compiled blocks inside every engine: gathered, sharded, checkpointed and replayed as eager ones are."""

import json

import pytest
from distributed import compile_worker

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1200)]

CELLS = ["ddp,2", "zero2,1", "zero3,1", "zero3,2", "fsdp2,2"]
FP32 = 1e-5  # as in test_parity.py
# Each of two towers of the student, without gradients and with them, and of teachers; the compiler's own trial. FSDP2
# takes one of them twice.
GRAPHS = 8


def test_compiled_equals_eager(tiny_teacher, tmp_path, run_ranks):
    """Student checkpointed, teachers in the engine but under FSDP2."""
    run_ranks([compile_worker.__file__, tiny_teacher, tmp_path / "found.json", *CELLS], timeout=1100)
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == CELLS
    for cell, result in found.items():
        assert result["apart"] <= FP32, cell
        assert 1 < result["graphs"] <= GRAPHS, cell
        assert not result["breaks"], cell
