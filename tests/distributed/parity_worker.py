"""Trains five steps under one engine and saves what test_parity.py compares; run under torchrun, or alone.

parity_worker.py OUT.safetensors TEACHER GLOBAL_BATCH ENGINE        ENGINE: plain | ddp | zero1 | zero2 | zero3
"""

import os
import sys

import tiny
import torch
from safetensors.torch import save_file

from kd_accel import distributed
from kd_accel.config import TrainConfig
from kd_accel.engine import Engine
from kd_accel.launch import start_accelerator
from kd_accel.models.student import Student
from kd_accel.models.teacher import Teacher
from kd_accel.objective import Objective
from kd_accel.optim import build_optimizer
from kd_accel.schedules import Progress
from kd_accel.schema import validate
from kd_accel.types import Batch

STEPS = 5


def config(batch_size: int, teacher: str, placement: str) -> TrainConfig:
    terms = {
        "clip": {"kind": "clip"},
        "feature": {"kind": "feature_mse", "weight": 20, "confidence": True},
        "kl": {"kind": "logit_kl", "confidence": True},
        "icl": {"kind": "interactive_contrastive", "scale": "own"},
    }
    return validate(
        TrainConfig,
        {
            "name": "parity",
            "precision": "fp32",
            "data": {"shards": "none", "batch_size": batch_size},
            "student": {"arch": tiny.arch(22, 7, layers=2), "projector": "linear"},
            "teacher": {"path": teacher, "placement": placement},
            "objective": {"terms": terms, "chunk_rows": 3},
            # A large eps makes Adam's step smooth in the gradient: with a small one, the rounding of a gradient that is
            # nearly zero decides the sign of a whole step, and any two orders of summation part ways.
            "optim": {"lr": 0.1, "eps": 1e-2, "steps": STEPS, "weight_decay": 0.1, "temperature_lr": 1e-2},
        },
    )


def global_batch(step: int, size: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    image = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator)
    text = torch.randint(1, 49408, (size, 12), generator=generator)
    return Batch(torch.arange(size), image, {"student": text, "teacher": text})


def rows_of_rank(batch: Batch) -> Batch:
    b = len(batch.ids) // distributed.world_size()
    mine = slice(distributed.rank() * b, (distributed.rank() + 1) * b)
    return Batch(batch.ids[mine], batch.image[mine], {name: tokens[mine] for name, tokens in batch.text.items()})


def gradients(engine: Engine) -> dict:
    """Every gradient whole, as the optimizer is about to see it (before clipping)."""
    from deepspeed.utils import safe_get_full_grad

    full = safe_get_full_grad if engine.zero_stage else lambda parameter: parameter.grad
    return {name: full(p).detach().float().cpu().clone() for name, p in engine.student.named_parameters()}


def train(name: str, size: int, teacher_path: str) -> dict:
    """Five steps; losses, the first step's gradients, the last parameters, under keys that name the engine."""
    stage = int(name.removeprefix("zero")) if name.startswith("zero") else 0
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true" if stage else "false"
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(stage)
    b = size // int(os.environ.get("WORLD_SIZE", "1"))
    placement = "replicated" if name == "zero1" else "engine"
    wanted = config(b, teacher_path, placement)
    accelerator = start_accelerator(precision="fp32", batch_size=b, grad_clip_norm=wanted.optim.grad_clip_norm)
    torch.manual_seed(1)
    teacher = Teacher(wanted.teacher)
    student = Student(wanted.student, {"teacher": teacher.embed_dim})
    objective = Objective(wanted.objective, teachers={"teacher": teacher.spec})
    engine = Engine(
        accelerator, student, {"teacher": teacher}, optimizer=build_optimizer(student, wanted.optim), config=wanted
    )
    engine.module.train()
    result = {}
    for step in range(STEPS):
        batch = rows_of_rank(global_batch(step, size))
        features, targets = engine.forward(batch)
        outcome = objective(features, targets, Progress(step))
        engine.backward(features, outcome.gradients)
        if step == 0:
            result |= {f"gradient.{key}": value for key, value in gradients(engine).items()}
            result |= {f"gradient.objective.{key}": p.grad.clone() for key, p in objective.named_parameters()}
        applied, grad_norm = engine.step(wanted.optim.lr)
        objective.step(Progress(step), lr=wanted.optim.lr, temperature_lr=wanted.optim.temperature_lr)
        result |= {f"loss.{step}": outcome.loss.clone(), f"grad_norm.{step}": torch.tensor(grad_norm)}
        assert applied
    result |= {f"parameter.{key}": value for key, value in engine.weights().items()}
    result |= {f"parameter.objective.{key}": p.detach().clone() for key, p in objective.named_parameters()}
    return {key: value.contiguous() for key, value in result.items()}


def main() -> None:
    out, teacher, size, name = sys.argv[1:]
    results = train(name, int(size), teacher)
    if distributed.is_main():
        save_file(results, out)
    distributed.end_process(0)


if __name__ == "__main__":
    main()
