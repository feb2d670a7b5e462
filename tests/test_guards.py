"""What Accelerate, DeepSpeed and torch would do silently wrong is one clear error at start-up, or cannot happen."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from test_engine import config_of, launched, start, step  # noqa: F401  the fixture among them
from torch import nn

from kd_accel import launch
from kd_accel.engine import Engine
from kd_accel.models.student import Student
from kd_accel.models.teacher import Teacher
from kd_accel.optim import build_optimizer
from kd_accel.schema import ConfigError


def launch_one(**changes):
    return launch.start_accelerator(**{"precision": "fp32", "batch_size": 4, "grad_clip_norm": 1.0} | changes)


# The launch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MULTI_CPU"])
def test_ranks_that_accelerate_does_not_see(monkeypatch, kind):
    """Without the backend's name every rank believes that it is alone."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    alone = SimpleNamespace(num_processes=1, distributed_type=SimpleNamespace(value=kind))
    with pytest.raises(ConfigError, match="launched 2 processes but Accelerate runs 1"):
        launch._check_launch(alone)


def test_deepspeed_that_was_not_started(monkeypatch):
    """Accelerate's choice must be the launcher's."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    plain = SimpleNamespace(num_processes=1, distributed_type=SimpleNamespace(value="MULTI_CPU"))
    with pytest.raises(ConfigError, match="asked for DeepSpeed=True but Accelerate chose MULTI_CPU"):
        launch._check_launch(plain)


def test_cpu_flag_with_several_processes(monkeypatch):
    """accelerate launch --cpu --num_processes 2 starts one process."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in {"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="--cpu starts one process.*launch/ddp.yaml"):
        launch_one()


def test_fsdp_without_gpu(monkeypatch):
    """Accelerate would run DDP."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="FSDP on GPUs only.*launch/zero3.yaml"):
        launch_one()


def test_use_cpu_with_deepspeed(launched, monkeypatch):  # noqa: F811
    """Accelerate would drop DeepSpeed."""
    launched(2)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ConfigError, match="ACCELERATE_USE_CPU turns DeepSpeed off"):
        launch_one()


def test_stage_zero(launched, monkeypatch):  # noqa: F811
    """DeepSpeed's stage 0 steps the optimizer at start-up."""
    launched(1)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0")
    with pytest.raises(ConfigError, match="stage 0"):
        launch_one(precision="bf16")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps=4.*train.accumulate=4"),
        ({"gradient_clipping": 0.5}, "clips gradients at 0.5, optim.grad_clip_norm=1.0"),
        ({"fp16": {"enabled": True}}, "turns fp16 on"),
        ({"train_batch_size": 64}, "train_batch_size=64.*data.batch_size"),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu=8.*data.batch_size"),
        ({"amp": {"enabled": True}}, "turns amp on"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "turns torch_autocast on"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1}}}, "a section optimizer"),
        ({"scheduler": {"type": "WarmupLR", "params": {}}}, "a section scheduler"),
    ],
)
def test_a_deepspeed_file_that_decides_what_our_config_decides(launched, monkeypatch, tmp_path, section, message):  # noqa: F811
    """It would be overruled, or overrule us, without a word."""
    launched(2)
    file = tmp_path / "deepspeed.json"
    file.write_text(
        json.dumps({"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto", **section})
    )
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    with pytest.raises(ConfigError, match=message):
        launch_one()


# The engine -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [0.0, 0.7])
def test_clipping_is_ours(launched, tiny_teacher, norm):  # noqa: F811
    """DeepSpeed's own default is 1.0; 0 is off."""
    launched(2)
    config = config_of(tiny_teacher, "fp32")
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"grad_clip_norm": norm})})
    engine, _ = start(config, grad_clip_norm=norm)
    assert engine.module.gradient_clipping() == norm


def test_transformers_does_not_partition_what_is_built_later(launched):  # noqa: F811
    """It would give any HuggingFace tower wrong weights under stage 3."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    launched(3)
    launch_one()
    assert not is_deepspeed_zero3_enabled()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            lambda student, optimizer: optimizer.param_groups[0]["params"].pop(),
            "optimizer and the trainable parameters",
        ),
        (
            lambda student, optimizer: optimizer.param_groups[1]["params"].append(
                optimizer.param_groups[0]["params"][0]
            ),
            "in two optimizer groups",
        ),
        (lambda student, optimizer: setattr(student, "scale_", frozen(torch.tensor(1.0))), "0-dim.*scale_"),
        (lambda student, optimizer: setattr(student, "wide", frozen(torch.ones(2, 3).T)), "non-contiguous.*wide"),
    ],
    ids=["left out", "twice", "0-dim", "transposed"],
)
def test_parameters_that_an_engine_would_lose_or_refuse(launched, tiny_teacher, fault, message):  # noqa: F811
    """Left out of the optimizer, in it twice, without dimensions, or not contiguous."""
    launched(0)
    config = config_of(tiny_teacher, "fp32")
    accelerator = launch_one()
    student, teachers = Student(config.student, {"teacher": 12}), {"teacher": Teacher(config.teacher)}
    optimizer = build_optimizer(student, config.optim)
    fault(student, optimizer)
    with pytest.raises(AssertionError, match=message):
        Engine(accelerator, student, teachers, optimizer=optimizer, config=config)


def frozen(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def test_another_engine_than_asked_for(launched, tiny_teacher):  # noqa: F811
    """What was prepared is looked at."""
    launched(2)
    engine, _ = start(config_of(tiny_teacher, "fp32"))
    engine.module = nn.Identity()
    with pytest.raises(AssertionError, match="asked for DeepSpeedEngine, Accelerate prepared Identity"):
        engine._check_engine()


def test_fsdp_with_a_teacher_inside(launched, tiny_teacher):  # noqa: F811
    """fully_shard wants one dtype."""
    launched(0)
    config = config_of(tiny_teacher, "fp32")
    student = Student(config.student, {"teacher": 12})
    accelerator = SimpleNamespace(is_fsdp2=True, deepspeed_plugin=None)
    with pytest.raises(ConfigError, match="teacher.placement=replicated"):
        Engine(accelerator, student, {}, optimizer=build_optimizer(student, config.optim), config=config)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_rate_is_the_steps(launched, tiny_teacher, stage):  # noqa: F811
    """Accelerate's scheduler would move it once per process."""
    launched(stage)
    engine, _ = start(config_of(tiny_teacher, "fp32"))
    step(engine, 0)
    assert {group["lr"] for group in engine.masters._adamw().param_groups} == {1e-2}
