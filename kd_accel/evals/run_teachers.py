"""The teachers of a run, as its config.yaml names them: "run" in the place of a model, run:NAME with several."""

from __future__ import annotations

from pathlib import Path

from kd_accel.config import TrainConfig, teachers_of
from kd_accel.config_files import load
from kd_accel.schema import ConfigError
from kd_accel.sections import TeacherConfig

TEACHER = "run"


def teacher_of_run(run: Path, name: str, given: str) -> TeacherConfig:
    """The teacher called `name`, or the only one where that is empty. Raises ConfigError that begins with `given`."""
    teachers = teachers_of_run(run, given)
    if name in teachers or (not name and len(teachers) == 1):
        return teachers[name] if name else next(iter(teachers.values()))
    choices = " or ".join(f"{TEACHER}:{known}" for known in teachers)
    raise ConfigError(f"{given}: {run} learned from several teachers, or from others: give {choices}")


def teachers_of_run(run: Path, given: str) -> dict[str, TeacherConfig]:
    """By name. Raises ConfigError, which begins with `given`, for no run, and for one that learned from nobody."""
    file = run / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{given}: {run} is no run, or has lost its config.yaml, which names the teacher")
    teachers = teachers_of(load(TrainConfig, [file]))
    if not teachers:
        raise ConfigError(f"{given}: {run} was trained without a teacher: name a model")
    return teachers
