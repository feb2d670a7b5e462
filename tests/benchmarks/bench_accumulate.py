"""Time and peak memory of accumulation: k micro-batches in one step, against the same samples without.

    python tests/benchmarks/bench_accumulate.py             # 8 x 16 samples, ViT-S/32-like, fp32: minutes on a CPU
    python tests/benchmarks/bench_accumulate.py --device cuda --precision bf16 --batch 256

Times are of one process, which runs the cases in turn, because the machine may be shared; the best of `--repeats`
counts. Memory is of a process per case: the most that it (or the GPU) held in a step, above what it held before the
models were made (all), and above weights and Adam's moments (step).

Whoever adds up gradients has those of the earlier micro-batches (4 bytes a parameter) beside the activations of the
next one; a single process with k = 1 never has both, DDP always has. "k losses, one step" is that ordinary
accumulation, which for contrastive losses is another and worse objective: against it, exactness itself costs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from distilling import take_step
from output import Peak, add_device, add_output, held, write

from kd_accel import assembly
from kd_accel.config import TrainConfig
from kd_accel.engine import Engine
from kd_accel.launch import start_accelerator
from kd_accel.models.release import write_release
from kd_accel.models.towers import build_open_clip
from kd_accel.objective import Objective
from kd_accel.optim import build_optimizer
from kd_accel.schema import validate
from kd_accel.types import Batch

TOKENS, PIXELS = 32, 224
TIME, MEMORY = 1.45, 1.10  # what accumulation may cost


def arch(width: int, layers: int, text_width: int, text_layers: int) -> dict:
    image = {"image_size": PIXELS, "patch_size": 32, "width": width, "layers": layers, "head_width": 64}
    text = {"context_length": TOKENS, "vocab_size": 49408, "width": text_width, "heads": 4, "layers": text_layers}
    return {"embed_dim": 256, "vision_cfg": image, "text_cfg": text}


STUDENT, TEACHER = arch(384, 6, 256, 4), arch(512, 8, 320, 6)


EXACT, ORDINARY = "train.accumulate = k", "k losses, one step"
SEPARATE, WHOLE = "k steps", "one batch of k * b"


@dataclass(frozen=True)
class Shape:
    """What a case does: so many steps of so many losses, each over micro-batches of so many rows."""

    steps: int
    losses: int
    micro_batches: int
    rows: int


class Run:
    """A student beside its teacher in one process, as train.py puts them together."""

    def __init__(self, options: argparse.Namespace, teacher: str):
        self.options = options
        config = validate(
            TrainConfig,
            {
                "name": "accumulate",
                "precision": options.precision,
                "data": {"shards": "none", "batch_size": options.batch},
                "student": {"arch": STUDENT},
                "teacher": {"path": teacher},
                "objective": {
                    "terms": {
                        "clip": {"kind": "clip"},
                        "kl": {"kind": "logit_kl"},
                        "feature": {"kind": "feature_mse", "confidence": True},
                    }
                },
                "optim": {"lr": 1e-4, "steps": 1000},
                "train": {"accumulate": options.micro_batches},
            },
        )
        accelerator = start_accelerator(precision=options.precision, batch_size=options.batch, grad_clip_norm=1.0)
        teachers = assembly.build_teachers(config)
        student = assembly.build_student(config, teachers)
        config = assembly.fit_models(config, student, teachers)
        specs = {"teacher": teachers["teacher"].spec}
        objective = Objective(config.objective, teachers=specs, widths=student.widths)
        self.objective = objective.to(accelerator.device)
        optimizer = build_optimizer(student, config.optim)
        self.engine = Engine(accelerator, student, teachers, optimizer=optimizer, config=config)
        self.engine.module.train()

    def steps(self, shape: Shape) -> float:
        """Seconds of the steps of a case."""
        groups = [[make_batch(shape.rows) for _ in range(shape.micro_batches)] for _ in range(shape.losses)]
        ids = torch.arange(shape.micro_batches * shape.rows, device=self.options.device)
        start = time.perf_counter()
        for _ in range(shape.steps):
            take_step(self.engine, self.objective, [(batches, ids) for batches in groups])
        if self.options.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def make_batch(rows: int) -> Batch:
    image = torch.randint(0, 256, (rows, 3, PIXELS, PIXELS), dtype=torch.uint8)
    text = torch.randint(1, 49408, (rows, TOKENS))
    return Batch(torch.arange(rows), image, {"student": text, "teacher": text})


def shapes(options: argparse.Namespace) -> dict[str, Shape]:
    """By case; all see the same number of samples."""
    k, b = options.micro_batches, options.batch
    return {
        EXACT: Shape(steps=1, losses=1, micro_batches=k, rows=b),
        ORDINARY: Shape(steps=1, losses=k, micro_batches=1, rows=b),
        SEPARATE: Shape(steps=k, losses=1, micro_batches=1, rows=b),
        WHOLE: Shape(steps=1, losses=1, micro_batches=1, rows=k * b),
    }


def times(options: argparse.Namespace, teacher: str) -> dict[str, float]:
    """Best seconds of each case, run in turn after one step of each size."""
    run, best = Run(options, teacher), {}
    run.steps(shapes(options)[SEPARATE])
    for _ in range(options.repeats):
        for case, shape in shapes(options).items():
            best[case] = min(best.get(case, float("inf")), run.steps(shape))
    return best


def peak(options: argparse.Namespace, teacher: str) -> dict[str, int]:
    """Most bytes held in a step of options.case: above the process without models, above its state; its gradients'."""
    bare = held(options.device)
    run = Run(options, teacher)
    run.steps(Shape(steps=1, losses=1, micro_batches=1, rows=2))  # so that the moments are there
    state = held(options.device)
    most = Peak(options.device)
    run.steps(shapes(options)[options.case])
    gradients = sum(4 * parameter.numel() for parameter in run.engine.student.parameters())
    return {"peak_bytes": most.above(bare), "step_peak_bytes": most.above(state), "gradients": gradients}


def child(teacher: str, *words: str) -> dict:
    """What a fresh process of this program prints."""
    command = [sys.executable, __file__, *sys.argv[1:], "--teacher", teacher, *words]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def make_teacher(folder: Path) -> str:
    module, contract, model_cfg, scale = build_open_clip(TEACHER, pretrained=None, preprocess=None, name="teacher")
    scales = {"log_scale": scale.log_scale, "logit_bias": scale.bias}
    write_release(folder, state=module.state_dict(), model_cfg=model_cfg, contract=contract, **scales)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16, help="samples of a micro-batch")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--repeats", type=int, default=3)
    add_device(parser)
    add_output(parser)
    parser.add_argument("--teacher", help="a release, in place of a random one")
    parser.add_argument("--case", help="its memory only, or the times of all for `times`; prints json")
    options = parser.parse_args()
    if options.case:
        measured = times(options, options.teacher) if options.case == "times" else peak(options, options.teacher)
        print(json.dumps(measured))
        return
    with tempfile.TemporaryDirectory() as folder:
        teacher = options.teacher or make_teacher(Path(folder) / "teacher")
        seconds = child(teacher, "--case", "times")
        figures = {case: child(teacher, "--case", case) | {"seconds": seconds[case]} for case in shapes(options)}
    report(figures, options)
    write(options.output, figures)


def report(figures: dict[str, dict], options: argparse.Namespace) -> None:
    gradients = figures[EXACT]["gradients"] / 2**20
    print(f"k = {options.micro_batches}, b = {options.batch}, {options.precision}, {options.device};", end=" ")
    print(f"the student's gradients are {gradients:.0f} MiB")
    print(f"{'case':20} {'seconds':>8} {'all MiB':>9} {'step MiB':>9}")
    for case, row in figures.items():
        mib = [row[key] / 2**20 for key in ("peak_bytes", "step_peak_bytes")]
        print(f"{case:20} {row['seconds']:>8.2f} {mib[0]:>9.0f} {mib[1]:>9.0f}")
    for case in (ORDINARY, SEPARATE, WHOLE):
        keys = ("seconds", "peak_bytes", "step_peak_bytes")
        time_ratio, *ratios = (figures[EXACT][key] / figures[case][key] for key in keys)
        print(f"{EXACT} / {case}: {time_ratio:.2f} of the time, {ratios[0]:.2f} ({ratios[1]:.2f}) of the memory")
    print(f"targets: {TIME} of the time, {MEMORY} of the memory of {SEPARATE}")


if __name__ == "__main__":
    main()
