"""Run by test_teacher.py under torchrun: where a teacher's bytes lie, and whether steps leave anything behind.

teacher_worker.py FOLDER TEACHER bytes     writes FOLDER/<case>.json and FOLDER/<case>/checkpoints
teacher_worker.py FOLDER TEACHER steps     writes FOLDER/<case>.json: [step, live tensors, resident bytes] by rank
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

import tiny
import torch

from kd_accel import assembly, distributed, processes
from kd_accel.checkpoint import TrainState
from kd_accel.config import TrainConfig
from kd_accel.engine import Engine
from kd_accel.launch import end_accelerator, start_accelerator
from kd_accel.models.teacher import Teacher
from kd_accel.objective import Objective
from kd_accel.optim import build_optimizer
from kd_accel.saver import Saver
from kd_accel.schedules import Progress
from kd_accel.schema import validate
from kd_accel.types import Batch

B = 4  # samples per rank and step
WARM_UP, STEPS, EVERY = 50, 100, 5  # steps that allocators need, steps that are watched, steps between two looks
LEAK = 256 * 2**10  # bytes per step of the leak that is put in
PAGE = os.sysconf("SC_PAGE_SIZE")
Rows = dict[str, torch.Tensor]


def case(stage: int, placement: str) -> str:
    return f"zero{stage}-{placement}"


class Run:
    """A tiny student beside a teacher in bf16, as train.py puts them together."""

    def __init__(self, teacher: str, stage: int, placement: str, folder: Path):
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
        self.config = validate(
            TrainConfig,
            {
                "name": case(stage, placement),
                "output_dir": str(folder),
                "precision": "bf16",
                "data": {"shards": "none", "batch_size": B},
                "student": {"arch": tiny.arch(16, 8), "projector": "linear"},
                "teacher": {"path": teacher, "placement": placement},
                "objective": {
                    "terms": {"kl": {"kind": "logit_kl", "confidence": True}, "feature": {"kind": "feature_mse"}}
                },
                "optim": {"lr": 1e-3, "steps": WARM_UP + STEPS},
            },
        )
        accelerator = start_accelerator(precision="bf16", batch_size=B, grad_clip_norm=1.0)
        torch.manual_seed(1)
        teachers = assembly.build_teachers(self.config)
        self.teacher = teachers["teacher"]
        student = assembly.build_student(self.config, teachers)
        self.config = assembly.fit_models(self.config, student, teachers)
        specs = {"teacher": self.teacher.spec}
        self.objective = Objective(self.config.objective, teachers=specs, widths=student.widths, num_ids=B)
        optimizer = build_optimizer(student, self.config.optim)
        self.engine = Engine(accelerator, student, teachers, optimizer=optimizer, config=self.config)
        self.engine.module.train()

    def step(self, number: int) -> Rows:
        """One training step; the teacher's features."""
        batch, progress = make_batch(number), Progress(number)
        features, targets = self.engine.forward([batch])
        outcome = self.objective(features, targets, progress, ids=batch.ids)
        self.engine.backward(outcome.gradients)
        assert self.engine.step(1e-3)[0]
        self.objective.step(progress, lr=1e-3, temperature_lr=1e-3)
        return targets["teacher"]


def make_batch(number: int) -> Batch:
    """Another one on each rank."""
    generator = torch.Generator().manual_seed(number * distributed.world_size() + distributed.rank())
    image = torch.randint(0, 256, (B, 3, 32, 32), dtype=torch.uint8, generator=generator)
    text = torch.randint(1, 49408, (B, 12), generator=generator)
    return Batch(torch.arange(B), image, {"student": text, "teacher": text})


def nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def held(teacher: Teacher) -> dict[str, int]:
    """Bytes of the teacher's parameters on this rank: its parts, and what is there whole."""
    parameters = list(teacher.parameters())
    parts = [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
    return {"parts": sum(map(nbytes, parts)), "whole": sum(nbytes(p.data) for p in parameters)}


def measure(teacher: str, stage: int, placement: str, folder: Path) -> None:
    """Three steps and a checkpoint: bytes by rank, the teacher's features against the plain teacher's."""
    run = Run(teacher, stage, placement, folder)
    plain = assembly.build_teachers(run.config)["teacher"].to(torch.bfloat16)
    difference = 0.0
    for number in range(3):
        batch = make_batch(number)
        expected, found = plain(batch.image, batch.text["teacher"]), run.step(number)
        difference = max(difference, *(((found[n] - rows).norm() / rows.norm()).item() for n, rows in expected.items()))
    student = dict(run.engine.student.named_parameters())
    optimized = sum(part.numel() for part in run.engine.masters._held_parameters())
    mine = {"held": held(run.teacher), "difference": difference, "optimized": optimized}
    state = TrainState(step=3, samples=3 * B * distributed.world_size(), global_batch=B * distributed.world_size())
    saver = Saver(folder / run.config.name, run.config, steps_per_epoch=1, total_steps=3, published=lambda _: None)
    saver.save(engine=run.engine, objective=run.objective, state=state, at_end=True)
    ranks = distributed.gather_objects(mine)
    if distributed.is_main():
        shapes = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in student.items()}
        result = {"ranks": ranks, "trained": shapes}
        (folder / f"{run.config.name}.json").write_text(json.dumps(result))
    end_accelerator()


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())  # isinstance would wake lazy proxies


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def watch(teacher: str, stage: int, placement: str, folder: Path, *, leak: bool) -> None:
    """100 steps after the warm-up; `leak` keeps each step's features, and 256 KiB that are no tensor."""
    run = Run(teacher, stage, placement, folder)
    kept = []
    if leak:
        run.teacher.register_forward_hook(lambda *words: kept.append((words[-1], os.urandom(LEAK))))
    looks = []
    for number in range(WARM_UP + STEPS):
        run.step(number)
        if number + 1 >= WARM_UP and (number + 1 - WARM_UP) % EVERY == 0:
            looks.append((number + 1, live_tensors(), resident_bytes()))
    ranks = distributed.gather_objects(looks)
    if distributed.is_main():
        (folder / f"{run.config.name}{'-leak' if leak else ''}.json").write_text(json.dumps(ranks))
    end_accelerator()


def main() -> None:
    folder, teacher, what = sys.argv[1:]
    if what == "bytes":
        for stage, placement in ((3, "engine"), (2, "engine"), (3, "replicated"), (2, "replicated")):
            measure(teacher, stage, placement, Path(folder))
    else:
        watch(teacher, 3, "engine", Path(folder), leak=False)
        watch(teacher, 2, "replicated", Path(folder), leak=False)
        watch(teacher, 3, "engine", Path(folder), leak=True)
    processes.end_process(0)


if __name__ == "__main__":
    main()
