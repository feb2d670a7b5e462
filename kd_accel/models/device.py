"""Where a model runs that no engine holds, and in which precision."""

from __future__ import annotations

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # by the `precision` of a config


def own_device() -> torch.device:
    """The GPU of this process, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
