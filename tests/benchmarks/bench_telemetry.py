"""What measuring the split of a step costs: steps with a clock and without, in turn, in one process.

    python tests/benchmarks/bench_telemetry.py --output telemetry.json      # seconds on a CPU

The model is about the smallest that anybody trains, so a larger one's share is smaller; and training measures only the
steps that it logs. `marks` is the clock by itself: as many spans as a step has, without the step.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import torch
from output import add_output, write

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tiny

from kd_accel.bench.synthetic import SyntheticLoader
from kd_accel.config import TrainConfig
from kd_accel.schema import validate
from kd_accel.timing import Clock, span
from kd_accel.train import Trainer

GOAL = 0.01  # of a step


def training(folder: Path, rows: int) -> TrainConfig:
    image = {"image_size": 64, "patch_size": 16, "width": 128, "layers": 4, "head_width": 32}
    text = {"context_length": 20, "vocab_size": 49408, "width": 80, "heads": 4, "layers": 2}
    values = {
        "name": "run",
        "output_dir": str(folder / "runs"),
        "precision": "fp32",
        "data": {"shards": str(tiny.write_shards(folder / "shards")), "batch_size": rows, "num_workers": 0},
        "student": {"arch": {"embed_dim": 128, "vision_cfg": image, "text_cfg": text}, "projector": "linear"},
        "teacher": {"path": str(tiny.write_teacher(folder / "teacher"))},
        "objective": {"terms": {"clip": {"kind": "clip"}, "feature": {"kind": "feature_mse"}}},
        "optim": {"lr": 1e-3, "steps": 100_000},
    }
    return validate(TrainConfig, values)


def step_seconds(trainer: Trainer, batches, *, measured: bool) -> float:
    device = trainer.accelerator.device
    began = time.perf_counter()
    with Clock(device) if measured else nullcontext() as clock:
        with span("data"):
            micro_batches = next(batches)
        trainer.train_step(micro_batches)
    if measured:
        clock.seconds()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def marks_seconds(trainer: Trainer, batches) -> float:
    """The clock's own work in a step: as many marks, of nothing."""
    device = trainer.accelerator.device
    with Clock(device) as clock:
        trainer.train_step(next(batches))
    spans, seconds = len(clock._marks) // 2, []
    for _ in range(100):
        began = time.perf_counter()
        with Clock(device) as empty:
            for _ in range(spans):
                with span("data"):
                    pass
        empty.seconds()
        seconds.append(time.perf_counter() - began)
    return median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100, help="of each kind")
    add_output(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(training(Path(folder), options.batch))
        contracts = {"student": trainer.student.wants, "teacher": trainer.teachers["teacher"].wants}
        sizes = {"batch_size": options.batch, "accumulate": 1, "world_size": 1}
        batches = iter(SyntheticLoader(contracts, {}, **sizes))
        taken = {True: [], False: []}
        for step in range(2 * options.steps + 10):
            seconds = step_seconds(trainer, batches, measured=step % 2 == 0)
            if step >= 10:  # the first ones allocate memory
                taken[step % 2 == 0].append(seconds)
        marks = marks_seconds(trainer, batches)
        trainer.metrics.close()
    never, always = median(taken[False]), median(taken[True])
    best = min(taken[True]) / min(taken[False]) - 1
    print(f"a step {1e3 * never:.2f} ms, measured {1e3 * always:.2f} ms: {always / never - 1:+.2%}, best {best:+.2%}")
    print(f"the clock's marks alone {1e6 * marks:.0f} us: {marks / never:.3%} of a step (goal {GOAL:.0%})")
    write(options.output, {"seconds": {"step": never, "measured_step": always, "marks": marks}})


if __name__ == "__main__":
    main()
