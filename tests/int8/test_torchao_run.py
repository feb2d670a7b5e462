"""A training run with an image tower that is int8 by torchao: resumed, and exported."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file

from kd_accel import checkpoint
from kd_accel.config import TrainConfig
from kd_accel.engine import Engine
from kd_accel.export.verb import run as export
from kd_accel.export_config import ExportConfig
from kd_accel.models.int8_state import FILE
from kd_accel.schema import ConfigError, validate
from kd_accel.train import run

LEARNING = {"objective": {"terms": {"clip": {"kind": "clip"}}}, "optim": {"lr": 1e-2, "steps": 4}}
WEIGHTS = "open_clip_model.safetensors"
for package in ("torchao", "onnxruntime"):
    pytest.importorskip(package, reason='the extras "quant-cpu" and "export" are not installed')


@pytest.fixture
def train(tmp_path, train_shards):
    """A function that trains a student and returns the run's folder."""

    def go(name, init=None, **changes):
        values = {
            "name": name,
            "output_dir": str(tmp_path / "runs"),
            "precision": "fp32",
            "data": {"shards": str(train_shards), "batch_size": 8, "num_workers": 0},
            "student": {"arch": tiny.arch(32), "init": init and str(init)},
            **LEARNING,
            "save": {"every_steps": 2},
        }
        run(validate(TrainConfig, values | changes))
        return tmp_path / "runs" / name

    return go


def test_it_goes_on_to_the_bit_and_is_exported(tmp_path, train):
    """With 2:4 sparsity; what travels is weights with the keys of a float model, and ranges."""
    dense, compress = train("dense"), {"int8": "torchao", "sparsity": "2:4"}
    whole = train("whole", dense, compress=compress)
    branch = train("branch", dense, compress=compress, resume=str(whole / "checkpoints" / "step_00000002"))
    start, ours, theirs = (checkpoint.newest(folder) / "student" for folder in (dense, branch, whole))
    for file in (WEIGHTS, FILE):
        torch.testing.assert_close(load_file(ours / file), load_file(theirs / file), rtol=0, atol=0)
    assert load_file(ours / WEIGHTS).keys() == load_file(start / WEIGHTS).keys()
    out = tmp_path / "out"
    export(ExportConfig(model=str(branch), out=str(out), format=["onnx"]))
    row = next(line for line in (out / "README.md").read_text().splitlines() if line.startswith("| int8 |"))
    assert float(row.split("|")[2]) < 0.01


@pytest.mark.parametrize(("stage", "fsdp"), [(3, False), (None, True)])
def test_engines_that_keep_weights_in_parts_are_refused(stage, fsdp):
    """A graph reads them all at once, and no layer of the tower is called, which would bring them together."""
    plugin = stage and SimpleNamespace(zero_stage=stage)
    accelerator = SimpleNamespace(deepspeed_plugin=plugin, is_fsdp2=fsdp)
    config = validate(
        TrainConfig, {"name": "x", "data": {"shards": "x", "batch_size": 1}, "student": {"arch": "x"}, **LEARNING}
    )
    with pytest.raises(ConfigError, match="compress.int8=torchao .* launch with ZeRO-2 or DDP"):
        Engine(accelerator, SimpleNamespace(int8="torchao"), {}, optimizer=None, config=config)


DISTILLED = {"terms": {"feature": {"kind": "feature_mse"}}}
MASKED = {"terms": {"masked": {"kind": "masked_feature_mse"}}}


@pytest.mark.parametrize(
    ("key", "changed"),
    [
        ("student.grad_checkpointing", {"student": {"arch": "x", "init": "y", "grad_checkpointing": True}}),
        ("objective.terms.masked", {"objective": MASKED}),
    ],
)
def test_what_a_graph_cannot_do_is_refused(key, changed):
    given = {"name": "x", "data": {"shards": "x", "batch_size": 1}, "student": {"arch": "x", "init": "y"}, **LEARNING}
    given |= {"teacher": {"path": "z"}, "objective": DISTILLED, "compress": {"int8": "torchao"}}
    validate(TrainConfig, given)
    with pytest.raises(ConfigError, match=f"{key} .*compress.int8=torchao"):
        validate(TrainConfig, given | changed)
