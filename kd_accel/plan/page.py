"""A plan in words and tables, for the console."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kd_accel.plan.memory import STAGES, Memory

if TYPE_CHECKING:
    from kd_accel.plan.verb import Plan

UNITS = ("B", "kB", "MB", "GB", "TB")


def in_words(plan: Plan, *, mfu: float) -> str:
    """What a training would cost."""
    return "\n\n".join(
        "\n".join(part) for part in (_models(plan), _memory(plan), _per_step(plan), _time(plan, mfu)) if part
    )


def _models(plan: Plan) -> list[str]:
    rows = plan.rows
    kept = plan.parameters["student"] - plan.parameters["trained"]
    frozen = f", {kept / 1e6:,.1f} M of them frozen" if kept else ""
    lines = [
        f"student    {plan.parameters['student'] / 1e6:,.1f} M parameters{frozen};"
        f" per sample {_giga(plan.student.forward / rows)} forward, {_giga(plan.student.backward / rows)} backward"
    ]
    for name, flops in plan.teachers.flops.items():
        lines.append(f"{name:10} {plan.parameters[name] / 1e6:,.1f} M parameters; per sample {_giga(flops / rows)}")
    share = plan.objective.flops / (plan.rows * plan.accumulate)
    lines.append(f"objective  per sample {_giga(share)}, {_bytes(plan.objective.peak)} at its peak")
    return lines


def _memory(plan: Plan) -> list[str]:
    parts = f" x {plan.accumulate} micro-batches" if plan.accumulate > 1 else ""
    head = f"a process with {plan.rows} rows{parts}, of {plan.world_size} ({plan.global_batch} samples per step)"
    names = [("no ZeRO", "ZeRO-1", "ZeRO-2", "ZeRO-3")[stage] for stage in STAGES]
    rows = [("", names), *((name, _by_stage(plan.memory, name)) for name in vars(plan.memory[0]))]
    rows += [*_sum(plan.memory, plan.device_memory), ("sent per step", [_bytes(plan.network[s]) for s in STAGES])]
    lines = [head, *_aligned(rows)]
    if other := plan.otherwise:
        more = _giga(abs(other.flops_per_sample - plan.flops_per_sample))
        lines += [
            f"the same with student.grad_checkpointing={str(other.grad_checkpointing).lower()},"
            f" for {more} {'more' if other.grad_checkpointing else 'less'} per sample",
            *_aligned([("activations", _by_stage(other.memory, "activations"))]),
            *_aligned(_sum(other.memory, plan.device_memory)),
        ]
    return lines


def _by_stage(memory: dict[int, Memory], name: str) -> list[str]:
    return [_bytes(getattr(memory[stage], name)) for stage in STAGES]


def _sum(memory: dict[int, Memory], of_device: int) -> list[tuple[str, list[str]]]:
    fits = ["yes" if memory[stage].total < of_device else "no" for stage in STAGES]
    return [("together", _by_stage(memory, "total")), (f"fits into {_bytes(of_device)}", fits)]


def _aligned(rows: list[tuple[str, list[str]]]) -> list[str]:
    return [f"  {name:18}" + "".join(f"{cell:>12}" for cell in cells) for name, cells in rows]


def _per_step(plan: Plan) -> list[str]:
    lines = [f"a checkpoint     {_bytes(plan.checkpoint)}"]
    for name, size in plan.store_per_sample.items():
        of_epoch = (
            "" if plan.samples_per_epoch is None else f", {_bytes(size * plan.samples_per_epoch)} for all samples"
        )
        lines.append(f"stored features  {_bytes(size)} per sample and view of {name}{of_epoch}")
    return lines


def _time(plan: Plan, mfu: float) -> list[str]:
    total = f"{plan.flops_per_sample / 1e9:,.1f} GFLOP per sample in all"
    if plan.samples is None:
        return [f"{total}; give samples_per_epoch for hours: the data is not there"]
    lines = [f"{total}; {plan.samples:,} samples at {100 * mfu:g} % of the peak, data and network not waited for"]
    for name, hours in plan.hours.items():
        each = f"  {plan.world_size}x{name}"
        lines.append(f"{each:14} {hours:10,.1f} hours {hours * plan.world_size:12,.1f} device hours")
    return lines


def _giga(flops: float) -> str:
    return f"{flops / 1e9:,.2f} GFLOP"


def _bytes(size: float) -> str:
    """Three digits and a unit of a thousand."""
    for unit in UNITS:
        if size < 1000 or unit == UNITS[-1]:
            return f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError(size)
