"""Training begins without what takes seconds to import and only some runs need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SLOW = (
    "transformers.modeling_utils",
    "sklearn",
    "scipy.optimize",
    "pandas",
    "matplotlib",
    "datasets",
    "deepspeed",
    "onnx",
)


@pytest.mark.parametrize("module", ["kd_accel.train", "kd_accel.plan.verb"])
def test_what_is_slow_to_import_waits(module):
    code = f"import sys, {module}; print(*(name for name in {SLOW} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.stdout.split() == []
