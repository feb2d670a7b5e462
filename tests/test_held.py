"""Parts of tensors, copied to memory that serves again, and put together."""

from __future__ import annotations

import pytest
import torch

from kd_accel.held import Held, HostMemory, Part, whole


def test_the_next_copy_takes_the_place_of_the_last():
    """One behind the other, as fp32; more than fits takes new memory."""
    memory = HostMemory()
    first = memory.copy(iter([torch.arange(6.0).view(2, 3), torch.ones(2, dtype=torch.bfloat16)]), size=9)
    assert first.tolist() == [0, 1, 2, 3, 4, 5, 1, 1]
    second = memory.copy([torch.full((9,), 7.0)], size=9)
    assert second.data_ptr() == first.data_ptr()
    assert first.tolist() == [7.0] * 8
    assert memory.copy([torch.zeros(10)], size=10).data_ptr() != first.data_ptr()
    assert second.tolist() == [7.0] * 9


def test_parts_become_whole():
    """Whatever their order; a tensor in one part is not copied."""
    values = torch.arange(10.0)
    parts = [Part("weight", "a", 4, 2), Part("weight", "a", 0, 4), Part("ema", "b", 0, 4)]
    held = Held(1, {"a": torch.Size([2, 3]), "b": torch.Size([4])}, parts, values, {})
    state = whole(held)
    assert state["weight"]["a"].tolist() == [[2, 3, 4], [5, 0, 1]]
    assert state["ema"]["b"].data_ptr() == values[6:].data_ptr()


def test_a_missing_part_is_noticed():
    """Memory that nobody filled must not reach a checkpoint."""
    held = Held(1, {"a": torch.Size([6])}, [Part("weight", "a", 0, 4)], torch.zeros(4), {})
    with pytest.raises(AssertionError, match="no rank holds all of"):
        whole(held)
