"""A training that has nothing wrong with it."""

from __future__ import annotations

import json

import pytest
import tiny

from kd_accel.config import TrainConfig
from kd_accel.config_files import load


@pytest.fixture
def train_yaml(tmp_path, train_shards, tiny_teacher):
    """The path of its file; it writes to the folder runs beside it."""
    file = tmp_path / "train.yaml"
    file.write_text(
        f"""
name: run
output_dir: {tmp_path / "runs"}
precision: fp32
data: {{shards: {train_shards}, batch_size: 4, num_workers: 1}}
student: {{arch: {json.dumps(tiny.arch())}, projector: linear}}
teacher: {{path: {tiny_teacher}}}
objective: {{terms: {{clip: {{kind: clip}}, feature: {{kind: feature_mse}}}}}}
optim: {{lr: 0.01, steps: 3}}
"""
    )
    return file


@pytest.fixture
def changed(train_yaml):
    """A function: the training with some keys changed."""
    return lambda *keys: load(TrainConfig, [train_yaml], keys)
