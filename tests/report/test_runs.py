"""What the report reads of run directories."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

from kd_accel.report.runs import count_parameters


def test_parameters_are_counted_from_the_release(tmp_path):
    """The header of the weights file alone gives the number of parameters."""
    tensors = {"matrix": torch.zeros(3, 5), "vector": torch.zeros(7), "scale": torch.zeros(())}
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    assert count_parameters(tmp_path) == sum(tensor.numel() for tensor in tensors.values())
