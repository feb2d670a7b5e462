"""How a model's cosines become logits, kept apart from its towers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Scale:
    """How a model's cosines become logits: exp(log_scale) * cosine + bias."""

    log_scale: float
    bias: float | None  # None: no bias


def take_scale(model: nn.Module) -> Scale:
    """Read logit_scale and logit_bias off an open_clip model and remove them from it."""
    # A bias of 0 is no bias; that is also what open_clip puts where the weights bring none.
    bias = None if model.logit_bias is None else model.logit_bias.item() or None
    scale = Scale(model.logit_scale.item(), bias)
    model.logit_scale = model.logit_bias = None
    odd = [name for name, p in model.named_parameters() if p.ndim == 0 or not p.is_contiguous()]
    assert not odd, f"DeepSpeed cannot prepare 0-dim or non-contiguous parameters: {odd}"
    return scale
