"""kd-accel plan TRAIN.yaml devices=8xH100: what a training would cost, from shapes alone.

    kd-accel plan configs/fastclip_kd.yaml samples_per_epoch=12_000_000

Nothing is fetched and no model is allocated. Memory is that of tensors: a GPU's context and what its allocator loses to
fragments, half a gigabyte to a few, come on top.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from kd_accel import assembly
from kd_accel.bindings import features_read
from kd_accel.config import teachers_of
from kd_accel.data.loader import rows_per_micro_batch
from kd_accel.data.open import open_source
from kd_accel.fit import check_fit
from kd_accel.models.student import Student
from kd_accel.plan.devices import TABLE, Device, this_device
from kd_accel.plan.memory import STAGES, Memory, Peaks, Weights, checkpoint_bytes, memory, network_bytes
from kd_accel.plan.page import in_words
from kd_accel.plan.shapes import shapes_only
from kd_accel.plan.step import (
    Inputs,
    ObjectiveCost,
    StudentCost,
    TeachersCost,
    inputs,
    live,
    objective_cost,
    student_cost,
    teachers_cost,
)
from kd_accel.plan_config import PlanConfig
from kd_accel.schema import ConfigError
from kd_accel.text_files import replace_text

FEATURE_BYTES = 4  # compared in fp32


@dataclass(frozen=True)
class Plan:
    """What a training would cost; bytes and FLOPs unless a name says otherwise."""

    rows: int  # of a process and micro-batch
    accumulate: int
    world_size: int
    global_batch: int
    device: str
    device_memory: int  # of one of them
    parameters: dict[str, int]  # student, trained, and by teacher
    student: StudentCost  # of a micro-batch, without ZeRO
    teachers: TeachersCost  # of a micro-batch
    objective: ObjectiveCost  # of a step, of one process
    flops_per_sample: float  # of everything
    memory: dict[int, Memory]  # by ZeRO stage, of a process
    otherwise: Otherwise | None  # None: the student cannot checkpoint its activations
    network: dict[int, int]  # by ZeRO stage: sent by a process in a step
    checkpoint: int
    store_per_sample: dict[str, int]  # by teacher: features of one view and caption in 16 bits
    samples_per_epoch: int | None  # None: nobody knows
    samples: int | None  # of the whole training
    hours: dict[str, float]  # by device, as many of them, at `mfu`


@dataclass(frozen=True)
class Otherwise:
    """The same with the other value of student.grad_checkpointing."""

    grad_checkpointing: bool
    flops_per_sample: float
    memory: dict[int, Memory]


def run(config: PlanConfig) -> None:
    """Print the plan. Raises ConfigError for what training would refuse, as far as that shows without weights."""
    plan = make_plan(config)
    print(in_words(plan, mfu=config.mfu))
    if config.output is not None:
        replace_text(Path(config.output), json.dumps(asdict(plan), indent=1) + "\n")


def make_plan(config: PlanConfig) -> Plan:
    """The plan of a training config. Raises ConfigError."""
    count, name = config.devices.split("x")
    accumulate, bf16 = config.train.accumulate, config.precision == "bf16"
    devices = {known.name: known for known in (*TABLE, this_device(torch.device("cpu"), bf16=bf16))}
    world_size = int(count)
    rows = rows_per_micro_batch(config.data, world_size, accumulate)
    with shapes_only():
        teachers = assembly.build_teachers(config, weights=False)
        student = assembly.build_student(config, teachers, weights=False)
        config = assembly.fit_models(config, student, teachers)
        weights = _weights(config, student, teachers)
        given = inputs(student, teachers, rows=rows)
        taught, costs = teachers_cost(teachers, given, bf16=bf16), _student_costs(config, student, given)
    global_batch = rows * accumulate * world_size
    on_epoch, samples = _samples(config, global_batch)
    check_fit(
        config.objective,
        widths=student.widths,
        teachers={name: teacher.spec for name, teacher in teachers.items()},
        num_samples=on_epoch,
        global_batch=global_batch,
        own_bias=student.scale.bias,
    )
    objective = objective_cost(config, student, teachers, rows=rows * accumulate, world_size=world_size)
    by_id = objective.bytes_per_sample_id * (on_epoch or 0)
    memories = [_memory(config, weights, own, taught, objective, by_id, world_size) for own in costs]
    compared = FEATURE_BYTES * global_batch * _width_compared(config, student, teachers)
    flops = [_flops_per_sample(own[False], taught, objective, rows=rows, accumulate=accumulate) for own in costs]
    return Plan(
        rows=rows,
        accumulate=accumulate,
        world_size=world_size,
        global_batch=global_batch,
        device=name,
        device_memory=devices[name].memory,
        parameters=_parameters(student, teachers),
        student=costs[0][False],
        teachers=taught,
        objective=objective,
        flops_per_sample=flops[0],
        memory=memories[0],
        otherwise=Otherwise(not config.student.grad_checkpointing, flops[1], memories[1]) if costs[1:] else None,
        network={
            stage: network_bytes(stage, weights, world_size=world_size, bf16=bf16, features=compared)
            for stage in STAGES
        },
        checkpoint=checkpoint_bytes(weights.trained, weights.frozen, has_average=_has_average(config)) + by_id,
        store_per_sample={
            name: 2 * t.embed_dim * len(assembly.towers_read(config, name)) for name, t in teachers.items()
        },
        samples_per_epoch=on_epoch,
        samples=samples,
        hours=_hours(flops[0], samples, [*devices.values()], world_size, config.mfu),
    )


def _student_costs(config: PlanConfig, student: Student, given: Inputs) -> list[dict[bool, StudentCost]]:
    """Without and with ZeRO, then with the other grad_checkpointing where the student can; inside shapes_only()."""

    def both() -> dict[bool, StudentCost]:
        return {
            zero: student_cost(student, given, bf16=config.precision == "bf16", zero=zero) for zero in (False, True)
        }

    as_configured = both()
    try:
        student.checkpoint_gradients(not config.student.grad_checkpointing)
    except ConfigError:
        return [as_configured]
    return [as_configured, both()]


def _memory(
    config: PlanConfig,
    weights: Weights,
    student: dict[bool, StudentCost],
    teachers: TeachersCost,
    objective: ObjectiveCost,
    by_id: int,
    world_size: int,
) -> dict[int, Memory]:
    """By ZeRO stage. Teachers run, and losses are computed, while the student's activations wait."""
    by_id //= world_size if config.objective.memory == "sharded" else 1
    found = {}
    for stage in STAGES:
        own = student[stage > 0]
        peaks = Peaks(max(own.peak, own.held + teachers.peak), own.held + objective.peak, by_id)
        sizes = {"world_size": world_size, "bf16": config.precision == "bf16", "has_average": _has_average(config)}
        found[stage] = memory(stage, weights, peaks, **sizes)
    return found


def _has_average(config: PlanConfig) -> bool:
    return config.train.ema_decay is not None


def _weights(config: PlanConfig, student: Student, teachers: assembly.Teachers) -> Weights:
    """Inside shapes_only()."""
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    low, inside, beside = 2 if config.precision == "bf16" else 4, 0, 0
    for name, model in live(teachers).items():
        section = teachers_of(config)[name]
        if section.placement == "engine":
            inside += _numel(model)
        else:
            beside += sum(
                p.numel() * (1 if section.placement == "int8" and p.ndim > 1 else low) for p in model.parameters()
            )
    return Weights(trained, _numel(student) - trained, inside, beside)


def _numel(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _parameters(student: Student, teachers: assembly.Teachers) -> dict[str, int]:
    return {
        "student": _numel(student),
        "trained": sum(p.numel() for p in student.parameters() if p.requires_grad),
    } | {name: _numel(teacher) for name, teacher in live(teachers).items()}


def _flops_per_sample(
    student: StudentCost, teachers: TeachersCost, objective: ObjectiveCost, *, rows: int, accumulate: int
) -> float:
    """Of several micro-batches the student's forward pass runs twice."""
    passes = student.forward * (2 if accumulate > 1 else 1) + student.backward
    return (passes + sum(teachers.flops.values())) / rows + objective.flops / (rows * accumulate)


def _width_compared(config: PlanConfig, student: Student, teachers: assembly.Teachers) -> int:
    """Numbers per sample that are compared across processes, the student's and the teachers'."""
    read = set().union(*(features_read(term, student.widths) for term in config.objective.terms.values()))
    of_teachers = sum(t.embed_dim * len(assembly.towers_read(config, name)) for name, t in teachers.items())
    return sum(student.widths[name] for name in read) + of_teachers


def _samples(config: PlanConfig, global_batch: int) -> tuple[int | None, int | None]:
    """(of an epoch, of the training); None where it depends on data that are not there."""
    on_epoch, optim = config.samples_per_epoch or config.data.num_samples, config.optim
    if on_epoch is None:
        with suppress(ConfigError):  # then there is no data yet, and hours stay unknown
            on_epoch = open_source(config.data, images=False, captions=True)[0].num_samples
    if optim.samples is not None or optim.steps is not None:
        return on_epoch, optim.samples or optim.steps * global_batch
    return on_epoch, None if on_epoch is None else optim.epochs * (on_epoch // global_batch) * global_batch


def _hours(flops: float, samples: int | None, devices: list[Device], count: int, mfu: float) -> dict[str, float]:
    if samples is None:
        return {}
    return {device.name: flops * samples / (count * device.flops * mfu) / 3600 for device in devices}
