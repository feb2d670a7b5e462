"""Small real stores and runs: pictures with several captions and a few broken samples, live and from the store."""

from __future__ import annotations

import io
import json
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import tiny
import torch
from PIL import Image
from torch import Tensor

from kd_accel import assembly
from kd_accel.config import TrainConfig
from kd_accel.data.index import build_index, expand_shards
from kd_accel.embed_config import EmbedConfig
from kd_accel.models.teacher import Teacher
from kd_accel.schema import validate

SIZES = (14, 11, 9)  # N = 34
BROKEN = (3, 20)  # the first is no picture, the second has no caption
FP16 = 2**-11  # of a number: half of the last of its 11 bits


def write_data(folder: Path, *, prefix: str = "s") -> Path:
    """Indexed shards of noisy pictures of some colours, with one to three captions each in a json member."""
    folder.mkdir(parents=True)
    rng, number = np.random.default_rng(2), 0
    for shard, size in enumerate(SIZES):
        with tarfile.open(folder / f"{shard:04d}.tar", "w") as tar:
            for _ in range(size):
                captions = [] if number == BROKEN[1] else [f"{number} and {i}" for i in range(1 + number % 3)]
                picture = b"no picture" if number == BROKEN[0] else _picture(rng)
                tiny.add(tar, f"{prefix}{number:04d}.jpg", picture)
                tiny.add(tar, f"{prefix}{number:04d}.json", json.dumps({"captions": captions}).encode())
                number += 1
    build_index(expand_shards(str(folder)))
    return folder


def _picture(rng: np.random.Generator) -> bytes:
    """64 x 56 pixels, of which crops differ."""
    coarse = rng.integers(0, 256, (7, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((64, 56), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def values(tmp: Path, shards: Path, release: Path, /, **changes) -> dict:
    """A training config whose epochs have four steps, of two micro-batches each."""
    terms = {"clip": {"kind": "clip"}, "kl": {"kind": "logit_kl"}, "feature": {"kind": "feature_mse"}}
    return {
        "name": "live",
        "output_dir": str(tmp),
        "seed": 7,
        "precision": "fp32",
        "data": {
            "shards": str(shards),
            "global_batch_size": 8,
            "num_workers": 0,
            "caption": "json:captions",
            "templates": ["{}", "a picture of {}"],
            "augment": {"scale": [0.3, 1.0], "flip": 0.5},
            "max_bad_fraction": 0.2,
        },
        "student": {"arch": tiny.arch(), "projector": "linear"},
        "teacher": {"path": str(release), "temperature": 0.02},
        "objective": {"terms": terms},
        "optim": {"lr": 1e-3, "steps": 2},
        "train": {"accumulate": 2},
        "log": {"every_steps": 1},
    } | changes


def train_config(*args, **changes) -> TrainConfig:
    return validate(TrainConfig, values(*args, **changes))


def embed_config(*args, **changes) -> EmbedConfig:
    return validate(EmbedConfig, values(*args) | {"views": 2} | changes)


def seen(config: TrainConfig, *, epochs: int) -> list[tuple[list[int], dict[str, Tensor]]]:
    """(ids, what the teacher says of them) of every micro-batch, as training gets it."""
    torch.manual_seed(config.seed)
    teachers = assembly.build_teachers(config)
    student = assembly.build_student(config, teachers)
    loader = assembly.build_loader(assembly.fit_models(config, student, teachers), student, teachers)
    teacher, found = teachers["teacher"], []
    for micro_batches in islice(loader, epochs * loader.steps_per_epoch):
        for batch in micro_batches:
            live = teacher(batch.image, batch.text.get("teacher")) if isinstance(teacher, Teacher) else {}
            found.append((batch.ids.tolist(), live | batch.stored.get("teacher", {})))
    return found


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
