"""What run directories hold, read for the report: rows, texts, examples, and what training remembers."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from kd_accel.config_files import read
from kd_accel.schema import ConfigError
from kd_accel.text_files import read_rows

MEMORY = "state/memory_*.safetensors"  # of a checkpoint: there training remembers confidences, by sample id


@dataclass(frozen=True, eq=False)
class Run:
    """What one run directory holds; None or no rows where a file is missing."""

    path: Path
    name: str
    number: int  # its place among the runs: decides its colour
    metrics: list[dict[str, Any]]  # rows of metrics.jsonl
    results: list[dict[str, Any]]  # rows of results.jsonl
    aggregates: list[dict[str, Any]]  # of aggregate.json: averages by model and step
    examples: list[dict[str, Any]]  # examples/*.json, as kd_accel.evals.examples writes them
    config: str | None  # text of config.yaml
    settings: dict[str, Any]  # the same, read
    environment: dict[str, Any] | None
    confidences: dict[str, np.ndarray] | None  # [N] by teacher, nan: never seen; None: unreadable
    parameters: int | None  # of the newest checkpoint's student; None: unreadable, or no checkpoint

    @property
    def teachers(self) -> dict[str, dict[str, Any]]:
        """The sections of its config that name a teacher; the single one is called "teacher"."""
        return teachers_in(self.settings)


def read_runs(paths: list[Path]) -> list[Run]:
    """Every run with a name and a number of its own. Raises ConfigError for a directory that does not exist."""
    named = zip(paths, _names(paths), strict=True)
    return [_read(path, name, number) for number, (path, name) in enumerate(named)]


def teachers_among(run: Run, runs: list[Run]) -> dict[str, Run]:
    """Those of `runs` that the config of `run` names as its teachers, by their name in it.

    Found by their path, else, as runs are moved and copied, by their directory's name where one of them alone has it.
    """
    found = {}
    for name, section in run.teachers.items():
        path = run_of(Path(section["path"])) if section.get("path") else None
        others = [other for other in runs if path and other is not run]
        same = [other for other in others if other.path.resolve() == path.resolve()]
        alike = [other for other in others if other.path.resolve().name == path.name]
        if same or len(alike) == 1:
            found[name] = (same or alike)[0]
    return found


def teachers_in(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The sections of a config.yaml, unchecked, that name a teacher; the single one is called "teacher"."""
    single = settings.get("teacher")
    return settings.get("teachers") or ({"teacher": single} if single else {})


def run_of(path: Path) -> Path:
    """RUN of RUN, RUN/checkpoints/step_00001000 and RUN/checkpoints/step_00001000/student."""
    return next((parent.parent for parent in (path, *path.parents) if parent.name == "checkpoints"), path)


def _names(runs: list[Path]) -> list[str]:
    """The directories' names, with the parent's where two runs share one."""
    names = [path.resolve().name for path in runs]
    return [f"{p.resolve().parent.name}/{n}" if names.count(n) > 1 else n for p, n in zip(runs, names, strict=True)]


def _read(path: Path, name: str, number: int) -> Run:
    if not path.is_dir():
        raise ConfigError(f"{path}: no such run directory; give the directory that kd-accel train wrote")

    def rows(file: str) -> list[dict[str, Any]]:
        return read_rows(path / file) if (path / file).exists() else []

    config, environment, checkpoint = path / "config.yaml", path / "environment.json", _newest_checkpoint(path)
    return Run(
        path=path,
        name=name,
        number=number,
        metrics=rows("metrics.jsonl"),
        results=[_result(row) for row in rows("results.jsonl")],
        aggregates=_read_json(path / "aggregate.json", list) if (path / "aggregate.json").exists() else [],
        examples=[_read_json(file, dict) for file in sorted(path.glob("examples/*.json"))],
        config=config.read_text(encoding="utf-8") if config.exists() else None,
        settings=read(config) if config.exists() else {},
        environment=_read_json(environment, dict) if environment.exists() else None,
        confidences=_read_confidences(checkpoint),
        parameters=_parameters(checkpoint),
    )


def _result(row: dict[str, Any]) -> dict[str, Any]:
    """Rows of early versions have neither key nor main metric: the set's name and the first metric stand for them."""
    metrics = row["metrics"]
    main = metrics.get("main_metric", next(iter(metrics.values()), None))
    return {"key": row["dataset"], **row, "metrics": metrics | {"main_metric": main}}


def _read_json(path: Path, kind: type) -> Any:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        values = None
    if not isinstance(values, kind):
        raise ConfigError(f"{path}: not what kd-accel writes (a JSON {kind.__name__}); repair or delete this file")
    return values


def count_parameters(release: Path) -> int:
    """Numbers in the release's weights, read from the header of the file alone."""
    with safe_open(release / "open_clip_model.safetensors", framework="numpy") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())


def _parameters(checkpoint: Path | None) -> int | None:
    try:
        return count_parameters(checkpoint / "student") if checkpoint else None
    except (OSError, SafetensorError):
        return None


def _newest_checkpoint(run: Path) -> Path | None:
    if not (run / "checkpoints").is_dir():
        return None
    from kd_accel.checkpoint import newest  # brings open_clip with it

    return newest(run)


def _read_confidences(checkpoint: Path | None) -> dict[str, np.ndarray] | None:
    """What the newest checkpoint remembers, and no other tensor of it; {} without a checkpoint or a memory."""
    if checkpoint is None:
        return {}
    from kd_accel.memory_files import memory_files

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
