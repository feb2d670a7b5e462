"""Small networks on top of a student's embeddings: projectors and prototype heads; none is released."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from kd_accel.sections import HeadConfig, PrototypeHeadConfig

TOWERS = ("image", "text")
_NORMS = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d, "none": nn.Identity}


def projector(kind: str | HeadConfig, width: int, teacher_width: int, *, towers: Sequence[str]) -> nn.ModuleDict:
    """Per tower, from the student's width to the teacher's: one linear layer, two with a GELU (mlp), or a head."""
    return _per_tower(towers, lambda: _projector(kind, width, teacher_width))


def prototype_head(config: PrototypeHeadConfig, width: int, *, towers: Sequence[str]) -> nn.ModuleDict:
    """Per tower a head to `config.width`.

    ProtoCLIP (arXiv 2206.10996) has batch norms in it; their statistics make the result depend on the number of
    processes and of micro-batches.
    """
    return _per_tower(towers, lambda: _head(config, width, config.width))


def _per_tower(towers: Sequence[str], build: Callable[[], nn.Module]) -> nn.ModuleDict:
    return nn.ModuleDict({tower: build() for tower in towers})


def _projector(kind: str | HeadConfig, width: int, teacher_width: int) -> nn.Module:
    match kind:
        case "linear":
            return nn.Linear(width, teacher_width)
        case "mlp":
            return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, teacher_width))
    return _head(kind, width, teacher_width)


def _head(config: HeadConfig, width: int, out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(config.layers):
        layers += [nn.Linear(width, config.hidden), _NORMS[config.norm](config.hidden), nn.ReLU()]
        width = config.hidden
    return nn.Sequential(*layers, nn.Linear(width, out))
