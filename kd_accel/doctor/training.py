"""Whether what the config names can be had, as train itself would find out, but without any weights."""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

from kd_accel import assembly, checkpoint, distributed
from kd_accel.config import TrainConfig, teachers_of
from kd_accel.data.loader import rows_per_micro_batch
from kd_accel.data.workers import is_lost_worker
from kd_accel.doctor.findings import Finding, checked
from kd_accel.evals.during import TrainingEvaluation
from kd_accel.metrics import check_trackers
from kd_accel.models.build import build_student
from kd_accel.models.release import resolve_release
from kd_accel.models.teacher import key_of
from kd_accel.push.background import BackgroundPush
from kd_accel.schema import ConfigError
from kd_accel.stored_teacher import StoredTeacher
from kd_accel.types import InputContract

STAND_IN_WIDTH = 512  # of a teacher's embeddings, which only its weights tell
BYTES_PER_PARAMETER = 16  # of a checkpoint: fp32 weights, two moments, and the release
EMA_BYTES_PER_PARAMETER = 8  # the average, and its release


def findings(config: TrainConfig) -> list[Finding]:
    """Of this rank: the run's folder, batch, models, data, trackers, evaluation sets and Hub."""
    run = Path(config.output_dir) / config.name
    found = [*checked("run", lambda: _run(config, run)), *checked("batch", lambda: _batch(config))]
    for name in teachers_of(config):
        found += checked(key_of(name), lambda name=name: _teacher(config, name))
    student: list[tuple[InputContract, int]] = []
    found += checked("student", lambda: _student(config, student))
    if student:
        contract, parameters = student[0]
        found += checked("data", lambda: _data(config, contract))
        found += checked("disk", lambda: _disk(config, parameters)) if distributed.is_main() else []
    if config.log.trackers:
        found += checked("trackers", lambda: check_trackers(config.log.trackers) or ", ".join(config.log.trackers))
    if config.eval is not None:
        found += checked("eval", lambda: TrainingEvaluation(config.eval, run) and "the sets are there")
    if config.hub is not None:
        found += checked("hub", lambda: BackgroundPush(config.hub, run) and "a token is there")
    return found


def _run(config: TrainConfig, run: Path) -> str:
    resume_from = checkpoint.find(config, run)
    return f"{run}, new" if resume_from is None else f"{run}, goes on from {resume_from}"


def _batch(config: TrainConfig) -> str:
    ranks, accumulate = distributed.world_size(), config.train.accumulate
    rows = rows_per_micro_batch(config.data, ranks, accumulate)
    return f"{rows} per process x {accumulate} micro-batches x {ranks} processes = {rows * accumulate * ranks} samples"


def _teacher(config: TrainConfig, name: str) -> str:
    section = teachers_of(config)[name]
    if section.placement == "cached":
        return f"{section.store}, {StoredTeacher(section, name=name).embed_dim} wide"
    if section.path is not None:
        return str(resolve_release(section.path))
    return f"{section.arch}, whose weights are not looked at"


def _student(config: TrainConfig, built: list[tuple[InputContract, int]]) -> str:
    """Adds (contract, parameters) to `built`."""
    fresh = config.student.model_copy(update={"pretrained": None})
    model, contract, *_ = build_student(fresh, teacher_width=STAND_IN_WIDTH if teachers_of(config) else None)
    parameters = sum(p.numel() for p in model.parameters())
    built.append((contract, parameters))
    return f"{parameters / 1e6:,.1f} M parameters, without projectors and heads"


def _data(config: TrainConfig, contract: InputContract) -> str | Finding:
    """Everything on the way of this rank's first step."""
    alone = config.model_copy(update={"teacher": None, "teachers": {}})
    loader = assembly.build_loader(alone, SimpleNamespace(wants=contract), {})
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


def _disk(config: TrainConfig, parameters: int) -> str | Finding:
    """Room for what save.keep_last keeps, and for the next one beside it. Raises ConfigError without room for one."""
    folder = _nearest(Path(config.output_dir))
    free = shutil.disk_usage(folder).free
    one = parameters * (BYTES_PER_PARAMETER + EMA_BYTES_PER_PARAMETER * (config.train.ema_decay is not None))
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
    files[distributed.rank()].unlink(missing_ok=True) if wrote[distributed.rank()] else None
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
