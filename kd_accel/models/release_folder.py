"""Where a release lies: by itself, in a checkpoint, or in a run. Imports no torch: `push` only finds one."""

from __future__ import annotations

import re
from pathlib import Path

from kd_accel.schema import ConfigError

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
IN_CHECKPOINT = ("student_ema", "student")  # the first that is there is what a checkpoint stands for
_STEP = re.compile(r"step_(\d+)")  # the directory of a checkpoint


def resolve_release(path: str) -> Path:
    """The release behind `path`: itself, or that of a checkpoint, or that of a run's newest checkpoint.

    Of a checkpoint student_ema/, the moving average, where there is one, else student/. Raises ConfigError that lists
    what was looked for.
    """
    folder = Path(path)
    if (folder / CONFIG).is_file():
        return folder
    if (release := _of_checkpoint(folder)) is not None:
        return release
    latest = folder / "checkpoints" / "latest"
    if latest.is_file():
        newest = latest.parent / latest.read_text(encoding="utf-8").strip()
        if (release := _of_checkpoint(newest)) is not None:
            return release
        raise ConfigError(f"{path}: {latest} names {newest.name}, but there is no {newest / 'student' / CONFIG}")
    if not folder.is_dir():
        raise ConfigError(f"{path}: no such directory (a release, a checkpoint or a run is needed)")
    raise ConfigError(
        f"{path}: no model here; looked for {CONFIG} (a release), student/{CONFIG} (a checkpoint)"
        " and checkpoints/latest (a run with a checkpoint)"
    )


def run_and_step(release: Path) -> tuple[Path, int] | None:
    """(RUN, 1000) of RUN/checkpoints/step_00001000/student; None for a release that lies in no run."""
    checkpoint = release.parent
    step = _STEP.fullmatch(checkpoint.name)
    if release.name not in IN_CHECKPOINT or step is None or checkpoint.parent.name != "checkpoints":
        return None
    return checkpoint.parent.parent, int(step[1])


def _of_checkpoint(folder: Path) -> Path | None:
    found = [folder / name for name in IN_CHECKPOINT if (folder / name / CONFIG).is_file()]
    return next(iter(found), None)
