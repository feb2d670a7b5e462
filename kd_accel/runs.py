"""What run directories hold, read for the report: rows, texts, and the confidences that training remembers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from kd_accel.metrics import read_rows
from kd_accel.pictures import COLORS
from kd_accel.schema import ConfigError

MEMORY = "state/memory_*.safetensors"  # of a checkpoint: there training remembers confidences, by sample id


@dataclass(frozen=True)
class Run:
    """What one run directory holds; None or no rows where a file is missing."""

    name: str
    color: str
    metrics: list[dict[str, Any]]  # rows of metrics.jsonl
    results: list[dict[str, Any]]  # rows of results.jsonl
    config: str | None  # text of config.yaml
    environment: dict[str, Any] | None
    confidences: dict[str, np.ndarray] | None  # [N] by teacher, nan: never seen; None: unreadable


def read_runs(paths: list[Path]) -> list[Run]:
    """Every run with a name and a colour of its own. Raises ConfigError for a directory that does not exist."""
    named = zip(paths, _names(paths), strict=True)
    return [_read(path, name, number) for number, (path, name) in enumerate(named)]


def _names(runs: list[Path]) -> list[str]:
    """The directories' names, with the parent's where two runs share one."""
    names = [path.resolve().name for path in runs]
    return [f"{p.resolve().parent.name}/{n}" if names.count(n) > 1 else n for p, n in zip(runs, names, strict=True)]


def _read(path: Path, name: str, number: int) -> Run:
    if not path.is_dir():
        raise ConfigError(f"{path}: no such run directory; give the directory that kd-accel train wrote")

    def rows(file: str) -> list[dict[str, Any]]:
        return read_rows(path / file) if (path / file).exists() else []

    config, environment = path / "config.yaml", path / "environment.json"
    return Run(
        name=name,
        color=COLORS[number % len(COLORS)],
        metrics=rows("metrics.jsonl"),
        results=rows("results.jsonl"),
        config=config.read_text(encoding="utf-8") if config.exists() else None,
        environment=json.loads(environment.read_text(encoding="utf-8")) if environment.exists() else None,
        confidences=_read_confidences(path),
    )


def _read_confidences(path: Path) -> dict[str, np.ndarray] | None:
    """What the newest checkpoint remembers, and no other tensor of it; {} without a checkpoint or a memory."""
    if not (path / "checkpoints").is_dir():
        return {}
    from kd_accel.checkpoint import newest  # brings the whole engine with it
    from kd_accel.memory_files import memory_files

    if (checkpoint := newest(path)) is None:
        return {}
    try:
        parts = [_confidences_of(file) for file in memory_files(checkpoint / "state")]
    except (OSError, SafetensorError):
        return None
    return {teacher: np.concatenate([part[teacher] for part in parts]) for teacher in (parts[0] if parts else [])}


def _confidences_of(file: Path) -> dict[str, np.ndarray]:
    """By teacher, of the sample ids in one file."""
    with safe_open(file, framework="numpy") as tensors:
        keys = [key.split(".") for key in tensors.keys()]
        teachers = sorted(key[1] for key in keys if key[0] == "confidences" and key[2:] == ["alpha"])
        return {teacher: tensors.get_tensor(f"confidences.{teacher}.alpha") for teacher in teachers}
