"""What `plan` says of a training is what the training takes, and it says so without weights and without memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import run_process
from tiny import arch
from torch.utils.flop_counter import FlopCounterMode

from kd_accel.cli import main
from kd_accel.config_files import load
from kd_accel.plan.memory import STAGES
from kd_accel.plan.shapes import shapes_only
from kd_accel.plan.verb import make_plan
from kd_accel.plan.watch import Watch
from kd_accel.plan_config import PlanConfig
from kd_accel.schema import ConfigError, validate

WORKER = Path(__file__).parent / "measured.py"
CLOSE = 0.1  # of what was measured

TEXT = {"context_length": 12, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 4}
VIT = {"image_size": 64, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32}
RESNET = {"timm_classifier": "resnet18", "image_size": 64}
TERMS = {"clip": {"kind": "clip"}}
DISTILLED = {**TERMS, "kl": {"kind": "logit_kl"}, "feature": {"kind": "feature_mse"}}


def training(tmp_path: Path, shards: Path, student: dict, *, terms: dict = TERMS, **sections) -> dict:
    optim = {"lr": 1e-3, "steps": 3}
    data = {"shards": str(shards), "batch_size": 32, "num_workers": 0}
    given = {"name": "run", "output_dir": str(tmp_path / "runs"), "data": data, "student": student, "optim": optim}
    return given | {"objective": {"terms": terms}} | sections


def plan_of(values: dict, **keys):
    return make_plan(validate(PlanConfig, values | {"devices": "1xA100"} | keys))


def measure(tmp_path: Path, values: dict, *launcher: str) -> dict:
    """What its steps took, in a process of its own."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    out = run_process([*(launcher or [sys.executable]), str(WORKER), str(file)], cold=True)
    return json.loads(next(line for line in out.splitlines() if line.startswith('{"peak"')))


CASES = {
    "ViT, fp32": ({"arch": {"embed_dim": 64, "vision_cfg": VIT, "text_cfg": TEXT}}, {"precision": "fp32"}),
    "checkpointed ViT beside a teacher, bf16": (
        {"arch": {"embed_dim": 12, "vision_cfg": VIT, "text_cfg": TEXT}, "grad_checkpointing": True},
        {"terms": DISTILLED},
    ),
    "ResNet, fp32, moving average": (
        {"arch": {"embed_dim": 64, "vision_cfg": RESNET, "text_cfg": TEXT}},
        {"precision": "fp32", "train": {"ema_decay": 0.9}},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_memory_and_flops_are_those_of_the_training(name, tmp_path, train_shards, tiny_teacher):
    student, sections = CASES[name]
    if "teacher" in name:
        sections = sections | {"teacher": {"path": str(tiny_teacher)}}
    values = training(tmp_path, train_shards, student, **sections)
    measured, plan = measure(tmp_path, values), plan_of(values)
    assert plan.memory[0].total == pytest.approx(measured["peak"], rel=CLOSE)
    assert plan.flops_per_sample == pytest.approx(measured["flops_per_sample"], rel=CLOSE)


@pytest.mark.slow
def test_memory_of_zero_2_is_that_of_deepspeed(tmp_path, train_shards):
    student, _ = CASES["ViT, fp32"]
    values = training(tmp_path, train_shards, student)
    root = Path(__file__).parents[2]
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    launcher += ["--config_file", str(root / "launch/zero2.yaml"), "--num_processes", "1"]
    measured, plan = measure(tmp_path, values, *launcher), plan_of(values)
    assert plan.memory[2].total == pytest.approx(measured["peak"], rel=0.15)


def test_one_row_per_process(tmp_path, train_shards):
    values = training(tmp_path, train_shards, CASES["ViT, fp32"][0])
    plan = plan_of(values | {"data": values["data"] | {"batch_size": 1}})
    assert plan.rows == 1
    assert 0 < plan.objective.peak < plan.student.peak


def test_a_checkpoint_is_as_large_as_the_plan_says(tmp_path, train_shards):
    student, _ = CASES["ViT, fp32"]
    values = training(tmp_path, train_shards, student, train={"ema_decay": 0.9})
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    assert main(["train", str(file)]) == 0
    written = (tmp_path / "runs/run/checkpoints/step_00000002").rglob("*.safetensors")
    assert sum(path.stat().st_size for path in written) == pytest.approx(plan_of(values).checkpoint, rel=0.02)


# GFLOP of a forward pass per pair, as open_clip publishes them (docs/model_profile.csv)
@pytest.mark.parametrize(("name", "published"), [("ViT-B-32", 14.78), ("ViT-B-16", 41.09), ("RN50", 18.18)])
def test_flops_are_those_that_open_clip_publishes(name, published, tmp_path):
    plan = plan_of(training(tmp_path, tmp_path, {"arch": name}), samples_per_epoch=1000)
    assert plan.student.forward / plan.rows / 1e9 == pytest.approx(published, rel=0.002)


def test_large_models_take_neither_memory_nor_network(tmp_path, monkeypatch):
    """An H/14 with pretrained weights: 4 GB that are neither fetched nor allocated."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    student, teacher = (
        {"arch": "ViT-B-32", "pretrained": "openai"},
        {"arch": "ViT-H-14", "pretrained": "laion2b_s32b_b79k"},
    )
    before = _resident()
    plan = plan_of(training(tmp_path, tmp_path, student, terms=DISTILLED | {"feature": None}, teacher=teacher))
    assert plan.parameters["teacher"] > 900e6
    assert _resident() - before < 500e6


def _resident() -> int:
    """Bytes of this process in memory, at most until now."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_grad_checkpointing_would_change_is_what_it_changes(checkpointing, tmp_path, train_shards):
    student, _ = CASES["ViT, fp32"]
    mine, other = (
        plan_of(training(tmp_path, train_shards, student | {"grad_checkpointing": on}), devices="2xH100")
        for on in (checkpointing, not checkpointing)
    )
    assert (mine.otherwise.memory, mine.otherwise.flops_per_sample) == (other.memory, other.flops_per_sample)
    assert (mine.memory[2].activations < other.memory[2].activations) == checkpointing


def test_a_student_that_cannot_checkpoint_has_no_otherwise(tmp_path):
    assert plan_of(training(tmp_path, tmp_path, {"arch": "RN50"}), samples_per_epoch=1000).otherwise is None


def test_zero_shares_out_what_it_says(tmp_path, train_shards):
    student, _ = CASES["ViT, fp32"]
    plan = plan_of(training(tmp_path, train_shards, student), devices="8xA100")
    trained = plan.parameters["trained"]
    assert [plan.memory[stage].optimizer for stage in STAGES] == [8 * trained, *[12 * trained // 8] * 3]
    assert [plan.memory[stage].gradients for stage in STAGES] == [4 * trained, 2 * trained, *[2 * trained // 8] * 2]
    assert plan.memory[3].weights < plan.memory[2].weights


def test_the_objective_grows_with_the_global_batch(tmp_path, train_shards):
    student, _ = CASES["ViT, fp32"]
    values = training(tmp_path, train_shards, student)
    one, eight = (plan_of(values, devices=f"{n}xA100").objective for n in (1, 8))
    assert one.peak < eight.peak < 8.5 * one.peak  # linear: tiles of 32 rows times 8 as many columns
    assert eight.flops == pytest.approx(8 * one.flops, rel=0.2)  # of one process


def test_objective_extrapolated_from_small_steps_is_that_of_a_large_one(tmp_path, train_shards, tiny_teacher):
    from kd_accel import assembly
    from kd_accel.plan.step import _objective_step, objective_cost

    student = {"arch": arch(24, 12)}
    values = training(tmp_path, train_shards, student, terms=DISTILLED, teacher={"path": str(tiny_teacher)})
    config = validate(PlanConfig, values)
    teachers = assembly.build_teachers(config)
    model = assembly.build_student(config, teachers)
    config = assembly.fit_models(config, model, teachers)
    guessed = objective_cost(config, model, teachers, rows=1024, world_size=1)
    real = _objective_step(config, model, teachers, rows=1024, chunk_rows=config.objective.chunk_rows)
    assert guessed.peak == pytest.approx(real.peak, rel=CLOSE)
    assert guessed.flops == pytest.approx(real.flops, rel=CLOSE)


def test_without_data_it_asks_for_the_samples(tmp_path, capsys):
    values = training(tmp_path, tmp_path / "absent", {"arch": arch()}, optim={"lr": 1e-3, "epochs": 2})
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    assert main(["plan", str(file), "devices=2xH100"]) == 0
    assert "samples_per_epoch" in capsys.readouterr().out
    assert main(["plan", str(file), "devices=2xH100", "samples_per_epoch=1000", f"output={tmp_path}/plan.json"]) == 0
    said = json.loads((tmp_path / "plan.json").read_text())
    assert said["samples"] == 2 * (1000 // 64) * 64  # whole steps of 2 x 32
    at_peak = said["flops_per_sample"] * said["samples"] / (2 * 989e12) / 3600
    assert said["hours"]["H100"] == pytest.approx(at_peak / 0.3)
    assert said["hours"].keys() == {"A100", "H100", "H200", "L40S", "CPU"}


@pytest.mark.parametrize(
    ("name", "head", "row"), [("pairs.csv", "filepath,title\n", "absent.jpg,text\n"), ("texts.txt", "", "text\n")]
)
def test_tables_are_counted_without_their_pictures(name, head, row, tmp_path):
    (tmp_path / name).write_text(head + 16 * row)
    data = {"table": str(tmp_path / name), "batch_size": 8, "num_workers": 0}
    values = training(tmp_path, tmp_path, {"arch": arch()}, data=data, optim={"lr": 1e-3, "epochs": 3})
    assert plan_of(values).samples == 3 * 16


@pytest.mark.parametrize("devices", ["H100", "0xH100", "8xT4", "8 H100"])
def test_unknown_devices_are_refused(devices, tmp_path):
    with pytest.raises(ConfigError, match="devices"):
        load(PlanConfig, [], [f"devices={devices}", "name=a", "student.arch=ViT-B-32", "optim.lr=1", "optim.steps=1"])


def test_what_training_would_refuse_is_refused(tmp_path, tiny_teacher):
    """Widths that differ, without a projector."""
    student = {"arch": {"embed_dim": 64, "vision_cfg": VIT, "text_cfg": TEXT}}
    values = training(tmp_path, tmp_path / "absent", student, terms=DISTILLED, teacher={"path": str(tiny_teacher)})
    with pytest.raises(ConfigError, match=r"student\.projector"):
        plan_of(values)


@pytest.mark.parametrize("passes", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_watch_counts_the_flops_that_torch_counts(passes):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2, padding=1),
        torch.nn.Flatten(2),
        torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
    )
    pixels = torch.zeros(2, 3, 8, 8)
    with Watch() as watch, passes():
        said = model(pixels)
        if said.requires_grad:
            said.sum().backward()
    with FlopCounterMode(display=False) as expected, passes():
        said = model(pixels)
        if said.requires_grad:
            said.sum().backward()
    assert watch.flops == expected.get_total_flops() > 0


def test_watch_counts_what_is_there():
    with shapes_only(), Watch() as watch:
        a = torch.zeros(1000, 10)
        b = a @ torch.zeros(10, 1000)
        del b
        c = a.view(10, 1000) + 1
    assert watch.held == a.nbytes + c.nbytes
    assert watch.peak >= 4 * 1000 * 1000 + a.nbytes
    assert watch.flops == 2 * 1000 * 10 * 1000
