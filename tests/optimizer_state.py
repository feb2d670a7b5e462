"""AdamW's memory as a checkpoint takes it, without the checkpoint."""

from __future__ import annotations

from kd_accel.engine import Engine
from kd_accel.held import WEIGHT, HostMemory, whole
from kd_accel.masters import OptimizerState


def optimizer_state(engine: Engine) -> OptimizerState:
    """By parameter name, filled on rank 0 only; collective."""
    held = engine.masters.held(HostMemory())
    state = whole(held)
    state.pop(WEIGHT, None)
    # pickled, a view of the one piece of memory would bring all of it
    moments = {key: {name: moment.clone() for name, moment in named.items()} for key, named in state.items()}
    return OptimizerState(step=held.step, moments=moments)
