"""A checkpoint is complete or absent, and knows neither ranks nor engine: safetensors and JSON, by parameter name.

    checkpoints/step_00001000/state/    weights, AdamW moments, objective, progress, one file of random states per rank
                              student/  the release: what open_clip loads
    checkpoints/latest                  names the newest directory

It is written under a temporary name, flushed to the disk, renamed; then `latest` is replaced. Nothing here is pickled.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kd_accel import distributed
from kd_accel.config import SaveConfig, TrainConfig
from kd_accel.engine import MOMENTS, Engine, OptimizerState
from kd_accel.metrics import flat
from kd_accel.models.release import write_release
from kd_accel.objective import Objective
from kd_accel.schema import ConfigError, dump, load

LATEST = "latest"
# Sections and keys that decide what is learned: a resumed run may not change them.
FIXED = ("seed", "student", "teacher", "teachers", "objective", "data")
FREE = ("data.num_workers", "data.max_bad_fraction", "data.batch_size", "data.global_batch_size")
FREE += ("objective.chunk_rows", "student.grad_checkpointing", "teacher.placement")


@dataclass
class TrainState:
    """Where the run stands; with the weights and the loss memory it decides everything that follows."""

    step: int = 0  # steps of the loop, applied or skipped
    samples: int = 0  # samples seen by all ranks
    skipped: int = 0  # steps whose gradient was not finite
    bad_samples: int = 0  # unreadable samples met by all ranks
    global_batch: int = 0  # samples per step, over all ranks
    data: dict = field(default_factory=dict)  # the loader's cursor


def save(run: Path, *, engine: Engine, objective: Objective, state: TrainState, config: TrainConfig) -> Path:
    """Write `run`/checkpoints/step_N and return it; collective. Older checkpoints go as `config.save` says."""
    target = run / "checkpoints" / f"step_{state.step:08d}"
    partial = target.with_name(f".partial_{target.name}")
    weights, memory = engine.weights(), engine.optimizer_state()
    assert memory.step == state.step - state.skipped, f"AdamW took {memory.step} steps, the loop {state}"
    if distributed.is_main():
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "state").mkdir(parents=True)
    distributed.barrier()
    save_file(_random_state(), partial / "state" / f"random_{distributed.rank():05d}.safetensors")
    if distributed.is_main():
        _write_state(partial / "state", weights, memory, objective, state, config)
        student = engine.student
        write_release(
            partial / "student",
            state=student.release_state(weights),
            model_cfg=student.model_cfg,
            contract=student.contract,
            log_scale=objective.log_logit_scale,
            logit_bias=objective.bias,
        )
    distributed.barrier()
    if distributed.is_main():
        _publish(partial, target)
        _prune(target.parent, config.save)
    distributed.barrier()
    return target


def restore(checkpoint: Path, *, engine: Engine, objective: Objective) -> TrainState:
    """Load what `save` wrote into the engine and the objective, and the random states of this rank; collective.

    Works for another engine and another number of ranks; random states are only restored for the same number.
    Raises ConfigError naming the file that is missing or damaged.
    """
    folder = checkpoint / "state"
    state = _read_progress(checkpoint)
    try:
        step = state.step - state.skipped
        engine.load_weights(load_file(folder / "weights.safetensors"))
        moments = {key: load_file(folder / f"{key}.safetensors") for key in MOMENTS}
        engine.load_optimizer_state(OptimizerState(step=step, moments=moments))
        objective.load_state(load_file(folder / "objective.safetensors"))
        if len(list(folder.glob("random_*.safetensors"))) == distributed.world_size():
            _set_random_state(load_file(folder / f"random_{distributed.rank():05d}.safetensors"))
    except (OSError, SafetensorError, KeyError) as error:
        raise _not_whole(checkpoint, error) from None
    return state


def _read_progress(checkpoint: Path) -> TrainState:
    try:
        return TrainState(**json.loads((checkpoint / "state" / "progress.json").read_text()))
    except (OSError, json.JSONDecodeError, TypeError) as error:
        raise _not_whole(checkpoint, error) from None


def _not_whole(checkpoint: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{checkpoint}: not a whole checkpoint ({error}); resume from an older one: resume=PATH")


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


def newest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run: the one `latest` names, or the highest step when that file is lost."""
    folder = run / "checkpoints"
    try:
        named = folder / (folder / LATEST).read_text().strip()
    except FileNotFoundError:
        named = folder
    if (named / "state" / "progress.json").is_file():
        return named
    return max(_steps(folder), default=None)


def check_config(checkpoint: Path, config: TrainConfig, *, global_batch: int) -> list[str]:
    """Compare the checkpoint's config with `config`; returns what changed and may, as "key: old -> new".

    Raises ConfigError, one line per key, for a change of what is being learned or of the global batch.
    """
    old = flat(load(TrainConfig, [checkpoint / "state" / "config.yaml"]).model_dump(mode="json"))
    new = flat(config.model_dump(mode="json"))
    changed = [key for key in old | new if old.get(key) != new.get(key) and key not in ("resume", "name", "output_dir")]
    fixed = [key for key in changed if key.split(".")[0] in FIXED and not _is_free(key)]
    lines = [f"{key}: the checkpoint has {old.get(key)!r}, the config {new.get(key)!r}" for key in fixed]
    if (before := _read_progress(checkpoint).global_batch) != global_batch:
        lines.append(f"data.global_batch_size: the checkpoint has {before}, this launch makes {global_batch}")
    if lines:
        raise ConfigError(
            "\n".join([*lines, f"{checkpoint} was trained otherwise: give its values back, or name=OTHER"])
        )
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in changed]


def _is_free(key: str) -> bool:
    return key in FREE or re.fullmatch(r"teachers\.\w+\.placement", key) is not None


def _write_state(folder: Path, weights, memory: OptimizerState, objective, state: TrainState, config) -> None:
    save_file(weights, folder / "weights.safetensors")
    for key in MOMENTS:
        save_file(memory.moments[key], folder / f"{key}.safetensors")
    save_file(objective.state(), folder / "objective.safetensors")
    (folder / "config.yaml").write_text(dump(config))
    (folder / "progress.json").write_text(json.dumps(asdict(state), indent=1))


def _publish(partial: Path, target: Path) -> None:
    """Flush every file, rename the directory, point `latest` at it: a kill at any moment leaves the old or the new."""
    for path in [*partial.rglob("*"), partial]:
        if path.suffix == ".safetensors":
            path.chmod(0o644)  # safetensors makes files that only their owner can read
        _flush(path)
    shutil.rmtree(target, ignore_errors=True)  # left by a run that was resumed from before this step
    os.rename(partial, target)
    _flush(target.parent)
    pointer = target.parent / f".{LATEST}"
    pointer.write_text(f"{target.name}\n")
    _flush(pointer)
    os.replace(pointer, target.parent / LATEST)
    _flush(target.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _prune(folder: Path, config: SaveConfig) -> None:
    """Drop checkpoints that neither keep_last nor keep_every holds."""
    for path in _steps(folder)[: -config.keep_last]:
        if config.keep_every is None or int(path.name.removeprefix("step_")) % config.keep_every:
            shutil.rmtree(path)


def _steps(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name))


def _random_state() -> dict[str, torch.Tensor]:
    """The generators that dropout, drop-path and libraries draw from, as tensors."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.append(keys.astype(np.int64), [position, has_gauss])),
        "numpy_gauss": torch.tensor(gauss, dtype=torch.float64),
        "python": torch.tensor([version, *internal], dtype=torch.int64),
        "python_gauss": torch.tensor(float("nan") if gauss_next is None else gauss_next, dtype=torch.float64),
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["torch"])
    *keys, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, state["numpy_gauss"].item()))
    version, *internal = state["python"].tolist()
    gauss = state["python_gauss"].item()
    random.setstate((version, tuple(internal), None if np.isnan(gauss) else gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
