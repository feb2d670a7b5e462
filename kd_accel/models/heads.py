"""Small networks on top of a student's embeddings: projectors and prototype heads; none is released."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from kd_accel.sections import PrototypeHeadConfig

TOWERS = ("image", "text")


def projector(kind: str, width: int, teacher_width: int, *, towers: Sequence[str]) -> nn.ModuleDict:
    """Per tower: one linear layer, or (mlp) two with a GELU between them, from the student's width to the teacher's."""
    return nn.ModuleDict({tower: _PROJECTORS[kind](width, teacher_width) for tower in towers})


def _mlp(width: int, teacher_width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, teacher_width))


_PROJECTORS = {"linear": nn.Linear, "mlp": _mlp}


def prototype_head(config: PrototypeHeadConfig, width: int, *, towers: Sequence[str]) -> nn.ModuleDict:
    """Per tower: Linear, LayerNorm, ReLU, `layers` times, and a Linear to `config.width`.

    ProtoCLIP (arXiv 2206.10996) has batch norms there; their statistics would make the result depend on the number of
    processes and of micro-batches.
    """
    return nn.ModuleDict({tower: _head(config, width) for tower in towers})


def _head(config: PrototypeHeadConfig, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(config.layers):
        layers += [nn.Linear(width, config.hidden), nn.LayerNorm(config.hidden), nn.ReLU()]
        width = config.hidden
    return nn.Sequential(*layers, nn.Linear(width, config.width))
