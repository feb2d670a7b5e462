"""The learnable logit scale, 1 / temperature, and its bounds: never wound up beyond them, never stuck at them.

A plain clamp kills the gradient outside, so a value that once left never returns; without one, AdamW carries the value
on and on beyond an end that the losses cannot see. Here the losses see the clamped value, the gradient passes, and what
would lead further out is blocked once all chunks and ranks have been summed: on parts of the sum, parts would be lost.
"""

from __future__ import annotations

import torch
from torch import Tensor


def logit_scale(log_scale: Tensor, max_log_scale: float) -> Tensor:
    """exp of log_scale held inside [0, max_log_scale]; the gradient is that at the held value."""
    return _Hold.apply(log_scale, max_log_scale).exp()


def block_outward(gradient: Tensor, log_scale: Tensor, max_log_scale: float) -> Tensor:
    """The whole batch's gradient, or zero where a step along it would lead (further) out of [0, max_log_scale]."""
    outward = ((log_scale <= 0) & (gradient > 0)) | ((log_scale >= max_log_scale) & (gradient < 0))
    return gradient.masked_fill(outward, 0.0)


class _Hold(torch.autograd.Function):
    """Clamp to [0, high] whose gradient passes unchanged."""

    @staticmethod
    def forward(ctx, value: Tensor, high: float) -> Tensor:
        return value.clamp(0.0, high)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None
