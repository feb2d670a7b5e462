"""Which parameter is decayed, and how the learning rates of a step follow from the step."""

from __future__ import annotations

import torch
from torch import nn

from kd_accel.config import OptimConfig
from kd_accel.schedules import Progress, value_at, warmup_cosine


def build_optimizer(student: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over every trainable parameter of the student, in the groups `decay` and `no_decay`.

    Vectors and scalars (biases, norms, class embedding) are not decayed. foreach is off: on CPU it only copies.
    """
    trained = [p for p in student.parameters() if p.requires_grad]
    groups = {
        "decay": {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        "no_decay": {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    }
    named = [{"name": name, **group} for name, group in groups.items() if group["params"]]
    return torch.optim.AdamW(named, lr=config.lr, betas=config.betas, eps=config.eps)


def learning_rates(config: OptimConfig, progress: Progress, *, total_steps: int) -> tuple[float, float]:
    """(towers', temperature's) learning rate of the step about to be taken."""
    warmup = config.warmup_steps
    lr = warmup_cosine(progress.step, lr=config.lr, min_lr=config.min_lr, warmup_steps=warmup, total_steps=total_steps)
    return lr, lr if config.temperature_lr is None else value_at(config.temperature_lr, progress)
