"""Freezes a tower but for its last groups: LiT (arXiv 2111.07991) with the image tower frozen, or a part of one.

    frozen = lock(student.clip, {"image": 0, "text": 2})

Groups are open_clip's, counted from the top: the projection; the last block with the norm behind it; the blocks below;
the embeddings. What lies beside a projection belongs to its group: heads and poolers of timm, torchvision and
HuggingFace. 0 freezes the whole tower: give a tower whose projection is fresh at least 1.
"""

from __future__ import annotations

import re

from torch import nn

from kd_accel.models.depth import layers_above
from kd_accel.schema import ConfigError

LAST_NORM = re.compile(r"\b(ln_post|ln_final|norm|final_norm|ln)\.(weight|bias)$")


def lock(clip: nn.Module, unlocked: dict[str, int]) -> list[str]:
    """Freeze each tower named, "image" or "text", but for its last groups; returns a phrase per tower for the log.

    `clip` keeps its image tower under `visual`, and its text tower beside it. Running statistics of frozen layers stay
    as they are in a module whose train() leaves what is frozen in eval mode, as Student's does.
    Raises ConfigError for a tower that is not there or has no more groups than shall train.
    """
    return [_lock_tower(clip, tower, groups) for tower, groups in unlocked.items()]


def _lock_tower(clip: nn.Module, tower: str, unlocked: int) -> str:
    named = {name: p for name, p in clip.named_parameters() if name.startswith("visual.") == (tower == "image")}
    if not named:
        raise ConfigError(f"student.lock.{tower}: the student has no {tower} tower")
    group_of = layers_above(named)
    if any(group_of.values()):  # the norm behind the last block goes with that block
        group_of |= {name: 1 for name, layers in group_of.items() if layers == 0 and LAST_NORM.search(name)}
    groups = sorted(set(group_of.values()))  # from the top
    if unlocked >= len(groups):
        raise ConfigError(
            f"student.lock.{tower}={unlocked}: the {tower} tower has {len(groups)} group{'s' * (len(groups) > 1)} of"
            f" layers, and nothing would be frozen: give at most {len(groups) - 1}, or leave it out"
        )
    frozen = [name for name in named if group_of[name] in groups[unlocked:]]
    for name in frozen:
        named[name].requires_grad_(False)
    return f"{tower} tower but for its last {unlocked} of {len(groups)} groups" if unlocked else f"{tower} tower"
