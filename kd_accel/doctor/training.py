"""Whether what the config names can be had, as train itself would find out, but without any weights."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from kd_accel import assembly, distributed, resume
from kd_accel.config import TrainConfig
from kd_accel.data.loader import rows_per_micro_batch
from kd_accel.data.workers import is_lost_worker
from kd_accel.doctor.findings import Finding, checked
from kd_accel.evals.during import TrainingEvaluation
from kd_accel.metrics import check_trackers
from kd_accel.models.student import Student
from kd_accel.models.teacher import key_of
from kd_accel.plan.memory import checkpoint_bytes
from kd_accel.plan.shapes import shapes_only
from kd_accel.push.background import BackgroundPush
from kd_accel.schema import ConfigError
from kd_accel.stored_teacher import StoredTeacher


@dataclass(frozen=True)
class Models:
    """Models without weights, and the config as they fit it."""

    config: TrainConfig
    student: Student
    teachers: assembly.Teachers


def findings(config: TrainConfig) -> list[Finding]:
    """Of this rank: the run's folder, batch, models, data, trackers, evaluation sets and Hub."""
    run = Path(config.output_dir) / config.name
    found = [*checked("run", lambda: _run(config, run)), *checked("batch", lambda: _batch(config))]
    models: list[Models] = []
    found += checked("models", lambda: _build(config, models))
    for built in models:  # none where they cannot be built
        found += checked("data", lambda built=built: _data(built))
        found += checked("disk", lambda built=built: _disk(config, built.student)) if distributed.is_main() else []
    if config.log.trackers:
        found += checked("trackers", lambda: check_trackers(config.log.trackers) or ", ".join(config.log.trackers))
    if config.eval is not None:
        found += checked("eval", lambda: _evaluation(config, run, models))
    if config.hub is not None:
        found += checked("hub", lambda: BackgroundPush(config.hub, run) and "a token is there")
    return found


def _run(config: TrainConfig, run: Path) -> str:
    resume_from = resume.find(config, run)
    return f"{run}, new" if resume_from is None else f"{run}, goes on from {resume_from}"


def _batch(config: TrainConfig) -> str:
    ranks, accumulate = distributed.world_size(), config.train.accumulate
    rows = rows_per_micro_batch(config.data, ranks, accumulate)
    return f"{rows} per process x {accumulate} micro-batches x {ranks} processes = {rows * accumulate * ranks} samples"


def _build(config: TrainConfig, built: list[Models]) -> str:
    """Adds the models to `built`: their shapes, and what they want to see."""
    with shapes_only():
        teachers = assembly.build_teachers(config, weights=False)
        student = assembly.build_student(config, teachers, weights=False)
        built.append(Models(assembly.fit_models(config, student, teachers), student, teachers))
    described = {"student": student, **{key_of(name): teacher for name, teacher in teachers.items()}}
    return ", ".join(
        f"{name} stored" if isinstance(model, StoredTeacher) else f"{name} {_numel(model.parameters()) / 1e6:,.1f} M"
        for name, model in described.items()
    )


def _numel(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def _data(models: Models) -> str | Finding:
    """Everything on the way of this rank's first step."""
    loader = assembly.build_loader(models.config, models.student, models.teachers)
    try:
        with closing(iter(loader)) as steps:
            next(steps)
    except RuntimeError as error:
        if not is_lost_worker(error):
            raise
        raise ConfigError("a worker of the loader died; when memory was short, lower data.num_workers") from error
    bad = loader.take_bad()
    if not bad:
        return f"{loader.steps_per_epoch} steps per epoch, of which the first can be read"
    rows = loader.batch_size * loader.accumulate
    return Finding("warn", "data", f"{len(bad)} of its first {rows} samples are unreadable: {bad[0]['reason']}")


def _evaluation(config: TrainConfig, run: Path, models: list[Models]) -> str:
    evaluation = TrainingEvaluation(config, run)
    for built in models:  # none where they cannot be built
        evaluation.check(built.student)
    return "the sets are there"


def _disk(config: TrainConfig, student: Student) -> str | Finding:
    """Room for what save.keep_last keeps, and for the next one beside it. Raises ConfigError without room for one."""
    folder = _nearest(Path(config.output_dir))
    free = shutil.disk_usage(folder).free
    trained = _numel(p for p in student.parameters() if p.requires_grad)
    frozen = _numel(student.parameters()) - trained
    one = checkpoint_bytes(trained, frozen, has_average=config.train.ema_decay is not None)
    said = f"{_shown(free)} free in {folder}, a checkpoint takes about {_shown(one)}"
    if free < one:
        raise ConfigError(f"{said}: make room, or set output_dir")
    most = config.save.keep_last + 1
    if free < most * one:
        return Finding("warn", "disk", f"{said}, and up to {most} are there at a time: lower save.keep_last, make room")
    return said


def _nearest(folder: Path) -> Path:
    """It, or the nearest folder above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def _shown(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def output_folder(config: TrainConfig) -> list[Finding]:
    """Whether this rank can write there, and sees what all others write; collective, leaves nothing behind."""
    folder = Path(config.output_dir)
    name = distributed.from_main(f".doctor_{secrets.token_hex(4)}")
    files = [folder / f"{name}_{rank}" for rank in range(distributed.world_size())]
    made: list[Path] = []
    found = checked("output", lambda: _make(folder, made) if distributed.is_main() else "")
    distributed.barrier()
    if not distributed.is_main() or found[0].status == "ok":
        found = checked("output", lambda: _write(folder, files[distributed.rank()]))
    wrote = distributed.gather_objects(found[0].status == "ok")
    unseen = [rank for rank, path in enumerate(files) if wrote[rank] and not path.exists()]
    if wrote[distributed.rank()] and unseen:
        said = f"output_dir={folder} is not the folder of rank {unseen[0]}: set it to one that all machines share"
        found = [Finding("FAIL", "output", said)]
    distributed.barrier()
    if wrote[distributed.rank()]:
        files[distributed.rank()].unlink(missing_ok=True)
    distributed.barrier()
    for path in made:
        path.rmdir()
    return found


def _make(folder: Path, made: list[Path]) -> str:
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir={folder}: cannot be written to ({error})") from None
    made += new
    return ""


def _write(folder: Path, file: Path) -> str:
    try:
        file.write_text(str(os.getpid()))
    except OSError as error:
        raise ConfigError(f"output_dir={folder}: cannot be written to ({error})") from None
    return f"{folder} can be written to" + (" and is the same for all" if distributed.world_size() > 1 else "")
