"""What a checkpoint holds of a training, copied while training waits and put together beside it.

taken = take_snapshot(...)       # every rank copies what it holds
snapshot = joined(taken, group)  # in any thread: rank 0 has the whole student, and checkpoint.py writes it
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from kd_accel import distributed
from kd_accel.checkpoint import Snapshot, TrainState
from kd_accel.config import TrainConfig
from kd_accel.config_files import dump
from kd_accel.engine import Engine
from kd_accel.held import WEIGHT, Held, HostMemory, whole
from kd_accel.int8 import split_clip
from kd_accel.masters import EMA, MOMENTS
from kd_accel.memory_files import memory_snapshot
from kd_accel.models.student import Student
from kd_accel.objective import Objective
from kd_accel.random_state import random_state


@dataclass(frozen=True)
class Taken:
    """A snapshot whose student still lies in parts, on the ranks that hold them."""

    snapshot: Snapshot
    held: Held
    student: Student  # for its names and settings; its weights train on
    scale: tuple[float, float | None]  # log_scale, logit_bias


def take_snapshot(
    *, engine: Engine, objective: Objective, state: TrainState, config: TrainConfig, memory: HostMemory
) -> Taken:
    """Copy everything that a checkpoint holds to this process's `memory`; collective."""
    held = engine.masters.held(memory)
    assert held.step == state.step - state.skipped, f"AdamW took {held.step} steps, the loop {state}"
    tensors = {f"state/random_{distributed.rank():05d}.safetensors": random_state()}
    tensors |= {f"state/{name}": columns for name, columns in memory_snapshot(objective).items()}
    texts = {}
    if distributed.is_main():
        tensors |= {"state/objective.safetensors": {name: t.cpu() for name, t in objective.state().items()}}
        texts = {"state/config.yaml": dump(config), "state/progress.json": json.dumps(asdict(state), indent=1)}
    snapshot = Snapshot(state.step, tensors, texts, {})
    return Taken(snapshot, held, engine.student, (objective.log_logit_scale, objective.bias))


def joined(taken: Taken, group=None) -> Snapshot:
    """The snapshot with the student's state on rank 0, which writes it; collective in `group`, from any thread."""
    state, snapshot = whole(taken.held, group), taken.snapshot
    if not distributed.is_main():
        return snapshot
    weights = state.pop(WEIGHT) | taken.held.untrained
    moments = {key: state.get(key, {}) for key in MOMENTS} | state
    versions = {"student": weights}
    if EMA in moments:
        versions["student_ema"] = weights | moments[EMA]  # buffers and frozen weights have no average
    tensors = {"weights": weights, **moments}
    return replace(
        snapshot,
        tensors=snapshot.tensors | {f"state/{name}.safetensors": values for name, values in tensors.items()},
        releases={folder: release_of(taken.student, w, *taken.scale) for folder, w in versions.items()},
    )


def release_of(
    student: Student, weights: dict[str, Tensor], log_scale: float, logit_bias: float | None
) -> dict[str, Any]:
    """What `write_release` wants of the student with these weights, which `Masters.weights` returned."""
    state, int8 = student.release_state(weights), None
    if student.int8 is not None:
        state, int8 = split_clip(student.int8, state)
    return {
        "state": state,
        "int8": int8,
        "model_cfg": student.model_cfg,
        "contract": student.contract,
        "log_scale": log_scale,
        "logit_bias": logit_bias,
        "hf_text": student.hf_text,
        "class_head": student.released_head(weights),
    }
