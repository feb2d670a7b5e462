"""Which parameter is decayed, at which rate its layer learns, and how the rates of a step follow from the step."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

from kd_accel.config import OptimConfig
from kd_accel.lamb import Lamb
from kd_accel.models.depth import layers_above
from kd_accel.schedules import Progress, one_cycle, value_at, warmup_constant, warmup_cosine


def build_optimizer(student: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW or LAMB over every trainable parameter of the student.

    Groups: `decay`, and `no_decay` for vectors and scalars (biases, norms, class embedding); with layer_decay each once
    per depth. A group's `lr_scale` multiplies the learning rate of every step. AdamW is torch's fused kernel, which
    works on the host as well. In LAMB a parameter without decay takes the plain Adam step, as in FastCLIP.
    """
    named = {name: p for name, p in student.named_parameters() if p.requires_grad}
    scales = layer_scales(list(named), config.layer_decay)
    members = defaultdict(list)
    for name, parameter in named.items():
        members["decay" if parameter.ndim >= 2 else "no_decay", scales[name]].append(parameter)
    decays = {"decay": config.weight_decay, "no_decay": 0.0}
    groups = [
        {"name": kind, "lr_scale": scale, "params": members[kind, scale], "weight_decay": decays[kind]}
        for kind, scale in sorted(members)
    ]
    if config.optimizer == "lamb":
        return Lamb(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def layer_scales(names: list[str], decay: float) -> dict[str, float]:
    """Factor of the learning rate by parameter name: decay ** (layers above it), as in BEiT (arXiv 2106.08254)."""
    return {name: decay**above for name, above in layers_above(names).items()}


def learning_rates(config: OptimConfig, progress: Progress, *, total_steps: int) -> tuple[float, float]:
    """(towers', temperature's) learning rate of the step about to be taken."""
    ends = {"lr": config.lr, "min_lr": config.min_lr, "warmup_steps": config.warmup_steps, "total_steps": total_steps}
    match config.schedule:
        case "cosine":
            lr = warmup_cosine(progress.step, **ends)
        case "one_cycle":
            lr = one_cycle(progress.step, **ends)
        case _:
            cooldown = {"cooldown_steps": config.cooldown_steps, "power": config.cooldown_power}
            lr = warmup_constant(progress.step, **ends, **cooldown)
    return lr, lr if config.temperature_lr is None else value_at(config.temperature_lr, progress)
