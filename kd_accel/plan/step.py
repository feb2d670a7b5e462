"""One step of one process without numbers: FLOPs and activations of student, teachers and objective.

FLOPs are those of captions at full length; `embed` and `train` cut them to the longest one of a batch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kd_accel.assembly import Teachers, towers_read
from kd_accel.config import TrainConfig
from kd_accel.data.views import largest
from kd_accel.models.class_embeddings import read_names
from kd_accel.models.student import Student
from kd_accel.models.teacher import Teacher
from kd_accel.objective import Objective
from kd_accel.plan.shapes import cast
from kd_accel.plan.watch import Watch
from kd_accel.schedules import Progress
from kd_accel.terms import LabelCE

Inputs = tuple[Tensor | None, dict[str, Tensor]]  # view, tokens by model


@dataclass(frozen=True)
class StudentCost:
    """Of one micro-batch."""

    forward: int  # FLOPs
    backward: int  # FLOPs, with what is computed again for it
    held: int  # bytes of activations that wait for the backward pass
    peak: int  # bytes of activations and gradients at most


@dataclass(frozen=True)
class TeachersCost:
    """Of one micro-batch."""

    flops: dict[str, int]  # by teacher
    peak: int  # bytes of activations at most


@dataclass(frozen=True)
class ObjectiveCost:
    """Of one step, of one of W processes."""

    flops: int
    peak: int  # bytes above the features
    bytes_per_sample_id: int  # that it remembers


def inputs(student: Student, teachers: Teachers, *, rows: int) -> Inputs:
    """One view that holds what every model wants, each model's tokens at full length; inside shapes_only()."""
    wants = {"student": student.wants, **{name: teacher.wants for name, teacher in live(teachers).items()}}
    size = largest(wants.values())
    image = None if size is None else torch.zeros(rows, 3, *size, dtype=torch.uint8)
    lengths = {name: contract.text.context_length for name, contract in wants.items() if contract.text is not None}
    return image, {name: torch.ones(rows, length, dtype=torch.int64) for name, length in lengths.items()}


def student_cost(student: Student, given: Inputs, *, bf16: bool, zero: bool) -> StudentCost:
    """Inside shapes_only(). `zero`: as DeepSpeed runs it, with bf16 weights, and gradients that are taken away at once;

    else bf16 is autocast, and gradients stay. FLOPs are the same.
    """
    image, text = given
    cast(student, torch.bfloat16 if bf16 and zero else torch.float32)
    student.train()
    trained = [p for p in student.parameters() if p.requires_grad and zero]
    hooks = [p.register_post_accumulate_grad_hook(_forget) for p in trained]
    with Watch() as watch:
        with _autocast(bf16 and not zero):
            said = student(image, text.get("student"))
        forward, held = watch.flops, watch.held
        sum(rows.float().sum() for rows in said.values()).backward()
    for hook in hooks:
        hook.remove()
    student.zero_grad()
    return StudentCost(forward, watch.flops - forward, held, watch.peak)


def teachers_cost(teachers: Teachers, given: Inputs, *, bf16: bool) -> TeachersCost:
    """Of those that run. Inside shapes_only()."""
    image, text = given
    flops = {}
    for teacher in live(teachers).values():
        cast(teacher, torch.bfloat16 if bf16 else torch.float32)
    with Watch() as watch, _autocast(bf16):
        for name, teacher in live(teachers).items():
            before = watch.flops
            teacher(image, text.get(name))
            flops[name] = watch.flops - before
    return TeachersCost(flops, watch.peak)


def live(teachers: Teachers) -> dict[str, Teacher]:
    """Those that run in training: the others' features are stored."""
    return {name: teacher for name, teacher in teachers.items() if isinstance(teacher, Teacher)}


def objective_cost(
    config: TrainConfig, student: Student, teachers: Teachers, *, rows: int, world_size: int
) -> ObjectiveCost:
    """From three small steps with random features, on this machine: FLOPs are of second degree in the global batch,

    memory grows with the global batch, and with the chunk of rows times it. Not inside shapes_only().
    """
    chunk, small, large = max(2, min(config.objective.chunk_rows, 64)), 128, 256
    first, second, third = (
        _objective_step(config, student, teachers, rows=n, chunk_rows=c)
        for n, c in ((small, chunk), (large, chunk), (large, chunk // 2))
    )
    batch = rows * world_size
    square = (second.flops / large - first.flops / small) / (large - small)
    linear = first.flops / small - square * small
    per_tile = (second.peak - third.peak) / ((chunk - chunk // 2) * large)
    per_row = (second.peak - first.peak) / (large - small) - per_tile * chunk
    constant = first.peak - per_tile * chunk * small - per_row * small
    tile = min(config.objective.chunk_rows, rows)
    return ObjectiveCost(
        flops=round((square * batch + linear) * batch / world_size),
        peak=round(constant + per_row * batch + per_tile * tile * batch),
        bytes_per_sample_id=first.bytes_per_sample_id,
    )


def _objective_step(
    config: TrainConfig, student: Student, teachers: Teachers, *, rows: int, chunk_rows: int
) -> ObjectiveCost:
    """What `rows` random rows of one process cost."""
    section = config.objective.model_copy(update={"chunk_rows": chunk_rows})
    objective = Objective(
        section,
        teachers={name: teacher.spec for name, teacher in teachers.items()},
        widths=student.widths,
        num_ids=rows,
        class_embeddings=_classes(config, student),
    )
    read = {name: towers_read(config, name) for name in teachers}
    features = {name: torch.randn(rows, width) for name, width in student.widths.items()}
    said = {
        name: {tower: torch.randn(rows, teachers[name].embed_dim) for tower in sorted(towers)}
        for name, towers in read.items()
    }
    with Watch() as watch:
        objective(features, said, Progress(), ids=torch.arange(rows), labels=torch.zeros(rows, dtype=torch.int64))
    return ObjectiveCost(watch.flops, watch.peak, objective.memory_bytes() // rows)


def _classes(config: TrainConfig, student: Student) -> dict[str, Tensor]:
    """Random rows for terms that compare with class names."""
    found = {}
    for name, term in config.objective.terms.items():
        if isinstance(term, LabelCE) and term.classes is not None:
            number = 1000 if term.classes.endswith(".safetensors") else len(read_names(Path(term.classes), name))
            found[name] = torch.randn(number, student.widths["image"])
    return found


def _autocast(enabled: bool) -> AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16) if enabled else nullcontext()


def _forget(parameter: Tensor) -> None:
    parameter.grad = None
