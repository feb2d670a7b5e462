"""Which parameter is decayed, at which rate its layer learns, and how the rates of a step follow from the step."""

from __future__ import annotations

import re
from collections import defaultdict

import torch
from torch import nn

from kd_accel.config import OptimConfig
from kd_accel.lamb import Lamb
from kd_accel.schedules import Progress, one_cycle, value_at, warmup_constant, warmup_cosine

BLOCK = re.compile(r"(.*?\b(?:resblocks|blocks|layers|layer|stages))\.?(\d+)\.")  # of a tower: its name, its number
BELOW_BLOCKS = re.compile(  # what comes before the first block
    r"class_embedding|positional_embedding|pos_embed|cls_token|reg_token|token_embedding|embeddings"
    r"|patch_embed|visual\.(conv|bn)\d|ln_pre|norm_pre|stem"
)


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
    """Factor of the learning rate by parameter name: decay ** (layers above it), as in BEiT (arXiv 2106.08254).

    Every tower counts its own blocks: embeddings lie below the first one; heads, last norms and projections on top have
    factor 1. So does a parameter whose place is unknown.
    """
    depth: dict[str, int] = {}  # blocks by tower
    found = {name: BLOCK.match(name) for name in names}
    for match in filter(None, found.values()):
        depth[match[1]] = max(depth.get(match[1], 0), int(match[2]) + 1)
    return {name: decay ** _layers_above(name, match, depth) for name, match in found.items()}


def _layers_above(name: str, match: re.Match | None, depth: dict[str, int]) -> int:
    if match is not None:
        return depth[match[1]] - int(match[2])
    if not BELOW_BLOCKS.search(name):
        return 0
    of_image = "visual" in name
    return max((blocks + 1 for tower, blocks in depth.items() if ("visual" in tower) == of_image), default=0)


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
