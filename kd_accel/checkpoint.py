"""A checkpoint is complete or absent, and knows neither ranks nor engine: safetensors and JSON, by parameter name.

    checkpoints/step_00001000/state/        weights, moments, objective, progress, random states of every rank
                              student/      the release: what open_clip loads; fp32
                              student_ema/  the same of the moving average, where there is one
                              files.json    size and SHA-256 of every file
    checkpoints/latest                      names the newest directory

It is written under a temporary name, flushed to the disk, renamed; then `latest` is replaced. Nothing here is pickled.
snapshot.py makes what is written, saver.py decides when, resume.py goes on from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kd_accel import distributed
from kd_accel.config import SaveConfig
from kd_accel.models.release import write_release
from kd_accel.schema import ConfigError

LATEST, FILES = "latest", "files.json"
PARTIAL = ".partial_"  # begins the name of a checkpoint that is being written


@dataclass
class TrainState:
    """Where the run stands; with the weights and the loss memory it decides everything that follows."""

    step: int = 0  # steps of the loop, applied or skipped
    total_steps: int = 0  # where the run ends, as its config says; 0: nobody said
    samples: int = 0  # samples seen by all ranks
    skipped: int = 0  # steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0  # the last ones
    bad_samples: int = 0  # unreadable samples met by all ranks
    global_batch: int = 0  # samples per step, over all ranks
    data: dict = field(default_factory=dict)  # the loader's cursor


@dataclass(frozen=True)
class Snapshot:
    """What this rank is to write of a checkpoint; by path inside of it, in memory that training no longer touches."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    texts: dict[str, str]
    releases: dict[str, dict[str, Any]]  # folder -> what write_release wants


def write(snapshot: Snapshot, folder: Path) -> dict[str, list]:
    """Write the files of this rank and flush them to the disk; path -> [bytes, SHA-256]. Raises OSError."""
    (folder / "state").mkdir(parents=True, exist_ok=True)
    try:
        for name, tensors in snapshot.tensors.items():
            save_file(tensors, folder / name)
        for name, text in snapshot.texts.items():
            (folder / name).write_text(text)
        for name, release in snapshot.releases.items():
            write_release(folder / name, **release)
    except SafetensorError as error:  # a full disk, in the words of safetensors
        raise OSError(str(error)) from None
    written = [folder / name for name in (*snapshot.tensors, *snapshot.texts)]
    written += [path for name in snapshot.releases for path in (folder / name).rglob("*") if path.is_file()]
    for path in written:
        path.chmod(0o644)  # safetensors makes files that only their owner can read
        _flush(path)
    return {str(path.relative_to(folder)): _fingerprint(path) for path in written}


def publish(folder: Path, files: dict[str, list], config: SaveConfig) -> Path:
    """Rename the directory that all ranks have written, point `latest` at it, drop what `config` does not keep.

    A kill at any moment leaves the old checkpoint or the new one. Raises OSError.
    """
    (folder / FILES).write_text(json.dumps(files, indent=1))
    for path in [folder / FILES, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _flush(path)
    target = folder.with_name(folder.name.removeprefix(PARTIAL))
    _remove(target)  # left by a run that was resumed from before this step
    os.rename(folder, target)
    _flush(target.parent)
    pointer = target.parent / f".{LATEST}"
    pointer.write_text(f"{target.name}\n")
    _flush(pointer)
    os.replace(pointer, target.parent / LATEST)
    _flush(target.parent)
    _prune(target, config)
    return target


def folder_for(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is written before it is published."""
    return run / "checkpoints" / f"{PARTIAL}step_{step:08d}"


def drop_partial(run: Path) -> None:
    """Remove what a killed or failed save left behind."""
    for path in (run / "checkpoints").glob(f"{PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, in a few words; None when all have their size and SHA-256."""
    try:
        files = json.loads((checkpoint / FILES).read_text())
        for name, fingerprint in files.items():
            if (checkpoint / name).stat().st_size != fingerprint[0]:
                return f"{name} is cut off or has grown"
            if _fingerprint(checkpoint / name) != fingerprint:
                return f"{name} is not what was written"
    except (OSError, ValueError) as error:
        return f"{FILES}: {error}"
    return None


def choose(found: Path | None, run: Path, *, may_go_back: bool) -> tuple[Path | None, list[str]]:
    """(the checkpoint to go on from, what is to be said of damaged ones); collective, rank 0 reads every file.

    With `may_go_back` a damaged one gives way to the newest whole one before it. Raises ConfigError without any.
    """
    chosen, said = distributed.from_main(_whole(found, run, may_go_back) if distributed.is_main() else None)
    if found is not None and chosen is None:
        raise ConfigError("\n".join([*said, f"{run}: no whole checkpoint is left; name=OTHER starts anew"]))
    return chosen, said


def _whole(found: Path | None, run: Path, may_go_back: bool) -> tuple[Path | None, list[str]]:
    older = [path for path in reversed(_steps(run / "checkpoints")) if found and path.name < found.name]
    said = []
    if found and may_go_back and found.name != _pointed_at(run):
        said.append(f"{run / 'checkpoints' / LATEST}: names no checkpoint; the highest step is taken")
    for path in [found, *(older if may_go_back else [])] if found else []:
        reason = damage(path)
        if reason is None:
            return path, said
        said.append(f"{path}: not a whole checkpoint ({reason})")
    return None, said


def read_progress(checkpoint: Path) -> TrainState:
    """Where a checkpoint's run stood. Raises ConfigError when the file is missing or damaged."""
    try:
        return TrainState(**json.loads((checkpoint / "state" / "progress.json").read_text()))
    except (OSError, json.JSONDecodeError, TypeError) as error:
        raise not_whole(checkpoint, error) from None


def not_whole(checkpoint: Path, error: Exception) -> ConfigError:
    """What is raised for a file that is missing or damaged."""
    return ConfigError(f"{checkpoint}: not a whole checkpoint ({error}); resume from an older one: resume=PATH")


def newest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run: the one `latest` names, or the highest step when that file is lost."""
    folder = run / "checkpoints"
    named = folder / _pointed_at(run)
    if (named / "state" / "progress.json").is_file():
        return named
    return max(_steps(folder), default=None)


def _pointed_at(run: Path) -> str:
    """The name in `latest`; empty where there is none to read."""
    try:
        return (run / "checkpoints" / LATEST).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def published(run: Path) -> dict[Path, str]:
    """The whole checkpoints of a run, oldest first, each with what tells it from another one of the same step."""
    found = {}
    for path in _steps(run / "checkpoints"):
        with suppress(OSError):  # dropped at this moment, or from before there was such a file
            found[path] = (path / FILES).read_text()
    return found


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's directory is named after."""
    return int(checkpoint.name.removeprefix("step_"))


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fingerprint(path: Path) -> list:
    """[bytes, SHA-256] of a file."""
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _prune(newest: Path, config: SaveConfig) -> None:
    """Drop checkpoints that neither keep_last nor keep_every holds; later ones are of an attempt that was given up."""
    for path in [path for path in _steps(newest.parent) if path <= newest][: -config.keep_last]:
        if config.keep_every is None or step_of(path) % config.keep_every:
            _remove(path)


def _remove(checkpoint: Path) -> None:
    """Drop a checkpoint, where it is there; a kill leaves it whole, or under a name that `drop_partial` knows."""
    with suppress(OSError):
        shutil.rmtree(checkpoint.rename(checkpoint.with_name(f"{PARTIAL}old_{checkpoint.name}")))


def _steps(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name))
