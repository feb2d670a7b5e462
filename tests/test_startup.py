"""Training begins without what takes seconds to import and only some runs need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SLOW = (
    "transformers.modeling_utils",
    "sklearn",
    "scipy.optimize",
    "pandas",
    "matplotlib",
    "datasets",
    "deepspeed",
    "onnx",
    "aiohttp",
)


def test_what_is_slow_to_import_waits():
    code = f"import sys, kd_accel.train, kd_accel.plan.verb; print(*(name for name in {SLOW} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.stdout.split() == []


DEEPSPEED = """
import sys, torch
from kd_accel import processes
from kd_accel.launch import start_accelerator
accelerator = start_accelerator(precision="fp32", batch_size=4, grad_clip_norm=1.0)
model = torch.nn.Linear(2, 2)
accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
print("muon" if "deepspeed.runtime.zero.muon.muon_optimizer" in sys.modules else "")
print("compiler" if "torch._inductor.compile_fx" in sys.modules else "")
from deepspeed.runtime import compiler
assert compiler.compile() is torch.compile
processes.end_process(0)
"""


def test_deepspeed_starts_without_torchs_compiler(tmp_path, run_ranks):
    """Preparing asks for DeepSpeed's Muon, whose kernels would be compiled."""
    (tmp_path / "start.py").write_text(DEEPSPEED)
    env = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
    out = run_ranks(tmp_path / "start.py", 1, env=env, cold=True)
    assert "muon" in out.split()
    assert "compiler" not in out.split()
