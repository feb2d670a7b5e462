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

from torch import nn

from kd_accel import assembly
from kd_accel.bindings import features_read
from kd_accel.config import teachers_of
from kd_accel.data.loader import rows_per_micro_batch
from kd_accel.data.open import open_source
from kd_accel.metrics import replace_text
from kd_accel.models.student import Student
from kd_accel.models.teacher import Teacher
from kd_accel.plan.devices import TABLE, Device, device
from kd_accel.plan.memory import STAGES, Memory, Weights, checkpoint_bytes, memory, network_bytes
from kd_accel.plan.page import in_words
from kd_accel.plan.shapes import shapes_only
from kd_accel.plan.step import ObjectiveCost, TowersCost, objective_cost, towers_cost
from kd_accel.plan_config import PlanConfig
from kd_accel.schema import ConfigError

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
    towers: TowersCost  # of a micro-batch
    objective: ObjectiveCost  # of a step, of one process
    flops_per_sample: float  # of everything
    memory: dict[int, Memory]  # by ZeRO stage, of a process
    network: dict[int, int]  # by ZeRO stage: sent by a process in a step
    checkpoint: int
    store_per_sample: dict[str, int]  # by teacher: features of one view and caption in 16 bits
    samples_per_epoch: int | None  # None: nobody knows
    samples: int | None  # of the whole training
    hours: dict[str, float]  # by device, as many of them, at `mfu`


def run(config: PlanConfig) -> None:
    """Print the plan. Raises ConfigError for what training would refuse, as far as that shows without weights."""
    plan = make_plan(config)
    print(in_words(plan, mfu=config.mfu))
    if config.output is not None:
        replace_text(Path(config.output), json.dumps(asdict(plan), indent=1) + "\n")


def make_plan(config: PlanConfig) -> Plan:
    """The plan of a training config. Raises ConfigError."""
    count, name = config.devices.split("x")
    world_size, chosen = int(count), device(name)
    rows = rows_per_micro_batch(config.data, world_size, config.train.accumulate)
    with shapes_only():
        teachers = assembly.build_teachers(config, weights=False)
        student = assembly.build_student(config, teachers, weights=False)
        config = assembly.fit_models(config, student, teachers)
        weights = _weights(config, student, teachers)
        plain, zero = (towers_cost(student, teachers, config, rows=rows, zero=zero) for zero in (False, True))
    objective = objective_cost(config, student, teachers, rows=rows * config.train.accumulate, world_size=world_size)
    global_batch = rows * config.train.accumulate * world_size
    flops = _flops_per_sample(plain, objective, rows=rows, accumulate=config.train.accumulate)
    on_epoch, samples = _samples(config, global_batch)
    by_id = objective.bytes_per_sample_id * (on_epoch or 0)
    shared = {"world_size": world_size, "bf16": config.precision == "bf16"}
    compared = FEATURE_BYTES * global_batch * _width_compared(config, student, teachers)
    by_id_here = by_id // (world_size if config.objective.memory == "sharded" else 1)
    activations = {
        stage: max(towers.peak, towers.held + objective.peak) + by_id_here
        for stage, towers in zip(STAGES, (plain, zero, zero, zero), strict=True)
    }
    average = config.train.ema_decay is not None
    return Plan(
        rows=rows,
        accumulate=config.train.accumulate,
        world_size=world_size,
        global_batch=global_batch,
        device=name,
        device_memory=chosen.memory,
        parameters=_parameters(student, teachers),
        towers=plain,
        objective=objective,
        flops_per_sample=flops,
        memory={
            stage: memory(stage, weights, **shared, has_average=average, activations=activations[stage])
            for stage in STAGES
        },
        network={stage: network_bytes(stage, weights, **shared, features=compared) for stage in STAGES},
        checkpoint=checkpoint_bytes(weights.trained, weights.frozen, has_average=average) + by_id,
        store_per_sample={
            name: 2 * t.embed_dim * len(assembly.towers_read(config, name)) for name, t in teachers.items()
        },
        samples_per_epoch=on_epoch,
        samples=samples,
        hours=_hours(flops, samples, [*TABLE, *([chosen] if name == "CPU" else [])], world_size, config.mfu),
    )


def _weights(config: PlanConfig, student: Student, teachers: assembly.Teachers) -> Weights:
    """Inside shapes_only()."""
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    low, inside, beside = 2 if config.precision == "bf16" else 4, 0, 0
    for name, section in teachers_of(config).items():
        model = teachers[name]
        if not isinstance(model, Teacher):
            continue
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
    live = {name: _numel(teacher) for name, teacher in teachers.items() if isinstance(teacher, Teacher)}
    return {
        "student": _numel(student),
        "trained": sum(p.numel() for p in student.parameters() if p.requires_grad),
    } | live


def _flops_per_sample(towers: TowersCost, objective: ObjectiveCost, *, rows: int, accumulate: int) -> float:
    """Of several micro-batches the student's forward pass runs twice."""
    passes = towers.student_forward * (2 if accumulate > 1 else 1) + towers.student_backward
    return (passes + sum(towers.teachers.values())) / rows + objective.flops / (rows * accumulate)


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
            on_epoch = open_source(config.data, images=False, captions=False)[0].num_samples
    if optim.samples is not None or optim.steps is not None:
        return on_epoch, optim.samples or optim.steps * global_batch
    return on_epoch, None if on_epoch is None else optim.epochs * (on_epoch // global_batch) * global_batch


def _hours(flops: float, samples: int | None, devices: list[Device], count: int, mfu: float) -> dict[str, float]:
    if samples is None:
        return {}
    return {device.name: flops * samples / (count * device.flops * mfu) / 3600 for device in devices}
