"""What is decayed, and which learning rates a step gets."""

from __future__ import annotations

import pytest
from torch import nn

from kd_accel.config import OptimConfig
from kd_accel.optim import build_optimizer, learning_rates
from kd_accel.schedules import Progress
from kd_accel.schema import ConfigError, validate


def config(**values) -> OptimConfig:
    return validate(OptimConfig, {"lr": 1.0, "steps": 10, "weight_decay": 0.3, **values})


def test_vectors_are_not_decayed():
    """Matrices and kernels decay; biases and norms do not; what is frozen is in no group."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm(4), nn.Linear(4, 2), nn.Linear(2, 2).requires_grad_(False))
    groups = {group["name"]: group for group in build_optimizer(model, config()).param_groups}
    assert {id(p) for p in groups["decay"]["params"]} == {id(model[0].weight), id(model[2].weight)}
    assert {id(p) for p in groups["no_decay"]["params"]} == {
        id(p) for p in (model[0].bias, model[1].weight, model[1].bias, model[2].bias)
    }
    assert groups["decay"]["weight_decay"] == 0.3
    assert groups["no_decay"]["weight_decay"] == 0.0


def test_empty_group_is_left_out():
    """DeepSpeed cannot flatten a group without parameters."""
    (group,) = build_optimizer(nn.Linear(2, 2, bias=False), config()).param_groups
    assert group["name"] == "decay"


def test_temperature_follows_lr_unless_told():
    """null: the towers' rate, warm-up included; a number or a schedule: that."""
    at = Progress(step=0, temperature=0.02)
    warm = {"warmup_steps": 4}
    assert learning_rates(config(**warm), at, total_steps=10) == (0.25, 0.25)
    assert learning_rates(config(**warm, temperature_lr=0.5), at, total_steps=10) == (0.25, 0.5)
    below = {"kind": "step_below", "value": 0.6, "threshold": 0.03, "ratio": 0.5}
    assert learning_rates(config(**warm, temperature_lr=below), at, total_steps=10)[1] == pytest.approx(0.3)


@pytest.mark.parametrize("values", [{"cooldown_steps": 3}, {"schedule": "constant_cooldown"}])
def test_cooldown_and_its_steps_need_each_other(values):
    with pytest.raises(ConfigError, match="cooldown_steps and schedule=constant_cooldown need each other"):
        config(**values)


def test_lamb_does_not_clip_by_itself():
    """The run's grad_clip_norm clips; timm's own default of 1 would do so a second time."""
    optimizer = build_optimizer(nn.Linear(2, 2), config(optimizer="lamb"))
    assert all(group["max_grad_norm"] is None for group in optimizer.param_groups)
