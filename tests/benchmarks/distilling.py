"""What the benchmarks of whole trainings share: shards of real pictures, a config with a teacher, one step."""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml
from torch import Tensor

from kd_accel.data.index import build_index, expand_shards
from kd_accel.engine import Engine
from kd_accel.objective import Objective
from kd_accel.schedules import Progress
from kd_accel.types import Batch

PAIRS = Path(__file__).resolve().parents[3] / "shared" / "data" / "pairs" / "train"


def add_shards(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", type=Path, default=PAIRS, help="webdataset tars with .jpg and .txt")


def link_shards(given: Path, folder: Path, number: int | None = None) -> Path:
    """The first `number` tars (None: all) in a folder of our own, with an index, which other trainers do not read."""
    folder.mkdir()
    for tar in sorted(given.glob("*.tar"))[:number]:
        (folder / tar.name).symlink_to(tar.resolve())
    build_index(expand_shards(str(folder)))
    return folder


def write_config(
    folder: Path, *, shards: Path, student: dict, teacher: dict, batch: int, num_workers: int, steps: int
) -> Path:
    """folder/run.yaml: `clip` and `logit_kl` in fp32, every step logged; the run goes to folder/runs/run."""
    config = {
        "name": "run",
        "output_dir": str(folder / "runs"),
        "precision": "fp32",
        "data": {"shards": str(shards), "batch_size": batch, "num_workers": num_workers},
        "student": {"arch": student},
        "teacher": teacher,
        "objective": {"terms": {"clip": {"kind": "clip"}, "kl": {"kind": "logit_kl"}}},
        "optim": {"lr": 5e-4, "steps": steps},
        "log": {"every_steps": 1},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def take_step(engine: Engine, objective: Objective, parts: list[tuple[list[Batch], Tensor]]) -> None:
    """Forward, losses and backward of each part (micro-batches, their ids [b]), then one step of the optimizers."""
    for micro_batches, ids in parts:
        features, targets = engine.forward(micro_batches)
        outcome = objective(features, targets, Progress(), ids=ids)
        engine.backward(outcome.gradients)
    engine.step(1e-4)
    objective.step(Progress(), lr=1e-4, temperature_lr=1e-4)
