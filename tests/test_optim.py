"""What is decayed, and which learning rates a step gets."""

from __future__ import annotations

import open_clip
import pytest
import torch
from torch import nn

from kd_accel.config import OptimConfig
from kd_accel.optim import build_optimizer, layer_scales, learning_rates
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


def test_layer_decay_counts_from_the_top_of_each_tower():
    """ViT-B-32: 12 blocks in each tower; embeddings lie below them, projections and last norms on top."""
    model = open_clip.create_model("ViT-B-32", device="meta", load_weights=False)
    scales = layer_scales([name for name, _ in model.named_parameters()], 0.5)
    for prefix in ("visual.transformer", "transformer"):
        assert scales[f"{prefix}.resblocks.11.mlp.c_fc.weight"] == 0.5
        assert scales[f"{prefix}.resblocks.0.mlp.c_fc.weight"] == 0.5**12
    below = ("visual.conv1.weight", "visual.class_embedding", "visual.positional_embedding", "visual.ln_pre.weight")
    assert {scales[name] for name in (*below, "token_embedding.weight", "positional_embedding")} == {0.5**13}
    assert {scales[name] for name in ("visual.proj", "visual.ln_post.weight", "text_projection", "ln_final.bias")} == {
        1
    }


def test_one_cycle_is_torchs():
    """OneCycleLR with its cosine: the same rate at every step, the top after the warm-up."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=50, pct_start=15 / 50, final_div_factor=100
    )
    values = config(lr=0.1, min_lr=0.1 / 25 / 100, warmup_steps=15, schedule="one_cycle")
    for step in range(50):
        ours, _ = learning_rates(values, Progress(step=step), total_steps=50)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        if step < 49:
            optimizer.step()
            theirs.step()


def test_one_length():
    """Epochs, steps or samples."""
    both = "exactly one of epochs, steps and samples; .* and samples are given: set all but one to null"
    with pytest.raises(ConfigError, match=both):
        config(samples=100)
