"""The teachers of a run, as its config.yaml names them: "run" in the place of a model, run:NAME with several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kd_accel.config import TrainConfig, teachers_of
from kd_accel.config_files import load
from kd_accel.schema import ConfigError
from kd_accel.sections import TeacherConfig

TEACHER = "run"


def teacher_called(name: str, teachers: Mapping[str, TeacherConfig], given: str) -> TeacherConfig:
    """The teacher called `name`, or the only one where that is empty. Raises ConfigError that begins with `given`."""
    if not teachers:
        raise ConfigError(f"{given}: the run is trained without a teacher: name a model")
    if name in teachers or (not name and len(teachers) == 1):
        return teachers[name] if name else next(iter(teachers.values()))
    choices = " or ".join(f"{TEACHER}:{known}" for known in teachers)
    raise ConfigError(f"{given}: the run learns from several teachers, or from others: give {choices}")


def teachers_of_run(run: Path, given: str) -> dict[str, TeacherConfig]:
    """By name; raises ConfigError, which begins with `given`, for no run."""
    file = run / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{given}: {run} is no run, or has lost its config.yaml, which names the teacher")
    return teachers_of(load(TrainConfig, [file]))
