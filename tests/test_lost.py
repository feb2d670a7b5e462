"""What ends a process from outside is one line that says what to do; everything else stays what it is."""

from __future__ import annotations

import pytest
import torch

from kd_accel.lost import told_in_one_line
from kd_accel.schema import LocalError

WORDS = {"waited": "8 s", "workers": "num_workers", "smaller": "lower batch_size", "then": "start again"}


def test_memory_that_is_short():
    """More than any machine has: torch's own error, of which the line keeps the first."""
    with pytest.raises(LocalError, match=r"^rank 0: out of memory: lower batch_size \(.*\); start again$") as said:
        with told_in_one_line(**WORDS):
            torch.empty(2**60, dtype=torch.uint8)
    assert "can't allocate memory" in str(said.value)
    assert "\n" not in str(said.value)


def test_memory_of_a_device_that_is_short():
    with pytest.raises(LocalError, match="out of memory: lower batch_size"), told_in_one_line(**WORDS):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_any_other_error_stays():
    with pytest.raises(RuntimeError, match=r"mat1 and mat2") as said, told_in_one_line(**WORDS):
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert not isinstance(said.value, LocalError)
