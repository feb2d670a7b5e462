"""Which parameter is decayed, and how the learning rates of a step follow from the step."""

from __future__ import annotations

import torch
from timm.optim import Lamb
from torch import nn

from kd_accel.config import OptimConfig
from kd_accel.schedules import Progress, value_at, warmup_constant, warmup_cosine


def build_optimizer(student: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW or LAMB over every trainable parameter of the student, in the groups `decay` and `no_decay`.

    Vectors and scalars (biases, norms, class embedding) are not decayed. foreach is off: on CPU it only copies. LAMB
    is timm's, without its own clipping: a parameter without decay takes the plain Adam step, as in FastCLIP.
    """
    trained = [p for p in student.parameters() if p.requires_grad]
    groups = {
        "decay": {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        "no_decay": {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    }
    named = [{"name": name, **group} for name, group in groups.items() if group["params"]]
    if config.optimizer == "lamb":
        return Lamb(named, lr=config.lr, betas=config.betas, eps=config.eps, max_grad_norm=None)
    return torch.optim.AdamW(named, lr=config.lr, betas=config.betas, eps=config.eps)


def learning_rates(config: OptimConfig, progress: Progress, *, total_steps: int) -> tuple[float, float]:
    """(towers', temperature's) learning rate of the step about to be taken."""
    ends = {"lr": config.lr, "min_lr": config.min_lr, "warmup_steps": config.warmup_steps, "total_steps": total_steps}
    if config.schedule == "cosine":
        lr = warmup_cosine(progress.step, **ends)
    else:
        lr = warmup_constant(progress.step, **ends, cooldown_steps=config.cooldown_steps, power=config.cooldown_power)
    return lr, lr if config.temperature_lr is None else value_at(config.temperature_lr, progress)
