"""Run by test_plan.py: what the tensors of two training steps took at most, and the FLOPs of a third one.

python tests/plan/measured.py CONFIG.yaml key=value ...      (or by `accelerate launch`)

The peak is that of torch's CPU allocator, from its own record. Whoever counts FLOPs keeps tensors alive: not meanwhile.
"""

from __future__ import annotations

import json
import sys

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from kd_accel import processes
from kd_accel.config import TrainConfig
from kd_accel.config_files import load
from kd_accel.train import Trainer


def main(file: str, overrides: list[str]) -> None:
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operation, whose FLOPs nobody counts
    config = load(TrainConfig, [file], overrides)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        trainer = Trainer(config)
        batches = iter(trainer.loader)
        for _ in range(2):
            trainer.train_step(next(batches))
    with FlopCounterMode(display=False) as flops:
        trainer.train_step(next(batches))
    peak = max(_totals(recorded.profiler.kineto_results.experimental_event_tree()))
    print(json.dumps({"peak": peak, "flops_per_sample": flops.get_total_flops() / trainer.loader.batch_size}))
    trainer.metrics.close()
    processes.end_process(0)


def _totals(events) -> list[int]:
    """Bytes that were allocated after each allocation."""
    found = []
    for event in events:
        found += [getattr(event.extra_fields, "total_allocated", 0), *_totals(event.children)]
    return found


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
