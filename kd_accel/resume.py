"""How a run goes on: from the checkpoint that `resume` asks for, where the config still fits it, all of it loaded."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from kd_accel import distributed
from kd_accel.checkpoint import TrainState, newest, not_whole, read_progress
from kd_accel.config import TrainConfig
from kd_accel.config_files import load
from kd_accel.engine import Engine
from kd_accel.masters import EMA, MOMENTS, OptimizerState
from kd_accel.memory_files import load_memory
from kd_accel.objective import Objective
from kd_accel.random_state import set_random_state
from kd_accel.schema import ConfigError, flat

# Sections that decide what is learned, which a resumed run may not change, and the keys in them that do not.
FIXED = ("seed", "student", "teacher", "teachers", "objective", "data", "compress")
FREE = (
    *("data.num_workers", "data.max_bad_fraction", "data.batch_size", "data.global_batch_size"),
    *("objective.chunk_rows", "objective.memory"),
    *("student.grad_checkpointing", "teacher.placement", "teacher.store"),
)


def find(config: TrainConfig, run: Path) -> Path | None:
    """The checkpoint that `config.resume` asks for, None for a fresh start; every rank finds the same one.

    Raises ConfigError when the run exists and resume=never, or when PATH is no checkpoint.
    """
    if config.resume == "never":
        if (run / "config.yaml").exists():
            raise ConfigError(f"{run}: this run exists; resume=auto goes on with it, name=OTHER starts another")
        return None
    if config.resume == "auto":
        return newest(run)
    path = Path(config.resume)
    if not (path / "state" / "progress.json").is_file():
        raise ConfigError(f"resume={path}: not a checkpoint directory (no state/progress.json in it)")
    return path


def check_config(checkpoint: Path, config: TrainConfig, *, global_batch: int) -> list[str]:
    """Compare the checkpoint's config with `config`; returns what changed and may, as "key: old -> new".

    Raises ConfigError, one line per key, for a change of what is being learned or of the global batch.
    """
    old = flat(load(TrainConfig, [checkpoint / "state" / "config.yaml"]).model_dump(mode="json"))
    new = flat(config.model_dump(mode="json"))
    changed = [key for key in old | new if old.get(key) != new.get(key) and key not in ("resume", "name", "output_dir")]
    fixed = [key for key in changed if key.split(".")[0] in FIXED and not _is_free(key)]
    lines = [f"{key}: the checkpoint has {old.get(key)!r}, the config {new.get(key)!r}" for key in fixed]
    if (before := read_progress(checkpoint).global_batch) != global_batch:
        lines.append(f"data.global_batch_size: the checkpoint has {before}, this launch makes {global_batch}")
    if lines:
        raise ConfigError(
            "\n".join([*lines, f"{checkpoint} was trained otherwise: give its values back, or name=OTHER"])
        )
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in changed]


def _is_free(key: str) -> bool:
    return key in FREE or re.fullmatch(r"teachers\.\w+\.(placement|store)", key) is not None


def restore(checkpoint: Path, *, engine: Engine, objective: Objective) -> TrainState:
    """Load a checkpoint into the engine and the objective, and the random states of this rank; collective.

    Works for another engine and another number of ranks; random states are only restored for the same number.
    Raises ConfigError naming the file that is missing or damaged.
    """
    folder = checkpoint / "state"
    state = read_progress(checkpoint)
    try:
        step = state.step - state.skipped
        engine.masters.load_weights(load_file(folder / "weights.safetensors"))
        keys = [*MOMENTS, EMA] if (folder / f"{EMA}.safetensors").exists() else MOMENTS
        moments = {key: load_file(folder / f"{key}.safetensors") for key in keys}
        engine.masters.load_optimizer_state(OptimizerState(step=step, moments=moments))
        objective.load_state(load_file(folder / "objective.safetensors"))
        load_memory(folder, objective)
        if len(list(folder.glob("random_*.safetensors"))) == distributed.world_size():
            set_random_state(load_file(folder / f"random_{distributed.rank():05d}.safetensors"))
    except (OSError, SafetensorError, KeyError) as error:
        raise not_whole(checkpoint, error) from None
    return state
