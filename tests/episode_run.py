"""What a trainer holds and an episode needs, tiny; and two ranks of it: episode_run.py FOLDER SHARDS TEACHER."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tiny
import torch
from torch import Tensor

from kd_accel import distributed, processes
from kd_accel.config import TrainConfig, teachers_of
from kd_accel.data.loader import TrainLoader
from kd_accel.engine import Engine
from kd_accel.episodes import Episodes
from kd_accel.launch import start_accelerator
from kd_accel.memory import Prototypes
from kd_accel.models.student import Student
from kd_accel.models.teacher import Teacher
from kd_accel.objective import Objective
from kd_accel.optim import build_optimizer
from kd_accel.schedules import Progress
from kd_accel.schema import validate

GLOBAL_BATCH, STEPS_PER_EPOCH = 8, 5  # of the 40 samples of train_shards
EPISODE = {"kind": "prototype", "clusters": 3, "episode_samples": 2 * GLOBAL_BATCH + 5}


@dataclass
class Pieces:
    """What a trainer holds and an episode needs."""

    loader: TrainLoader
    engine: Engine
    objective: Objective
    episodes: Episodes

    def clusters(self, term: str = "prototype") -> Prototypes:
        return self.objective.recall[term].clusters

    def labels(self, tower: str, term: str = "prototype") -> Tensor:
        """Of every sample id."""
        return self.clusters(term).labels_of(torch.arange(self.loader.num_samples))[tower]

    def progress(self) -> Progress:
        """Before the batch that the loader gives next."""
        step = self.loader.epoch * STEPS_PER_EPOCH + self.loader.batches_done
        return Progress(step, step / STEPS_PER_EPOCH, step * GLOBAL_BATCH)

    def train(self, steps: int) -> list[list[int]]:
        """The trainer's loop without a step of the towers; the ids of its batches."""
        ids, batches = [], iter(self.loader)
        for _ in range(steps):
            self.episodes.prepare(self.progress())
            ids.append(next(batches)[0].ids.tolist())
        return ids


def config_of(shards, teacher, terms: dict, **student) -> TrainConfig:
    return validate(
        TrainConfig,
        {
            "name": "episodes",
            "precision": "fp32",
            "data": {"shards": str(shards), "global_batch_size": GLOBAL_BATCH, "num_workers": 0},
            "student": {"arch": tiny.arch(patch_dropout=0.5), **student},  # only eval mode repeats itself
            "teacher": {"path": str(teacher)},
            "objective": {"terms": {"kl": {"kind": "logit_kl"}, **terms}},
            "optim": {"lr": 1e-2, "steps": 10},
        },
    )


def build(config: TrainConfig) -> Pieces:
    rows = GLOBAL_BATCH // int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = start_accelerator(precision=config.precision, batch_size=rows, grad_clip_norm=1.0)
    torch.manual_seed(1)
    teachers = {name: Teacher(section, name=name) for name, section in teachers_of(config).items()}
    student = Student(config.student, {name: teacher.embed_dim for name, teacher in teachers.items()})
    build_loader = partial(
        TrainLoader,
        config.data,
        contracts={name: model.contract for name, model in {"student": student, **teachers}.items()},
        seed=config.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    loader = build_loader()
    specs = {name: teacher.spec for name, teacher in teachers.items()}
    objective = Objective(config.objective, teachers=specs, widths=student.widths, num_ids=loader.num_samples)
    engine = Engine(accelerator, student, teachers, optimizer=build_optimizer(student, config.optim), config=config)
    made = Episodes(objective, engine, loader=loader, build_loader=build_loader, seed=config.seed)
    return Pieces(loader, engine, objective, made)


def main(folder: str, shards: str, teacher: str) -> None:
    pieces = build(config_of(shards, teacher, {"prototype": EPISODE}))
    pieces.train(3)
    torch.save(pieces.clusters().state_dict(), Path(folder) / f"{distributed.rank()}.pt")
    processes.end_process(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
