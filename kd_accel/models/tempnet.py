"""TempNet: a small network that reads a sample's temperature off its features (arXiv 2404.04575), one per tower.

It belongs to the objective: fp32, replicated, stepped there; the towers get no gradient from it. b rows of this rank,
B rows of all ranks, d width, M prototypes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_accel.terms import NetworkTemperature


class TempNet(nn.Module):
    """One tower's network.

    With x = dropout(sigmoid(W h + c)), r = <x, unit prototypes>, w = softmax(r / s), q = sigmoid(r):

        tempnet      min + (max - min) sigmoid(linear_1((w - 1 / M) q))
        disttempnet  (linear_1(w q) - linear_2(q / M)) / rho, held inside [min, max]

    proj           W, c
    scaler         log s
    prototypes     [M, d]
    linear_1, linear_2 (disttempnet)
    initialised    [] bool: whether the prototypes are samples' features yet
    """

    def __init__(self, width: int, config: NetworkTemperature, *, rho: float, reference: bool):
        """Fresh weights come from torch's global generator.

        `reference`: disttempnet as DistTempNet's code has it, with random prototypes, and dead at the end of its range.
        """
        super().__init__()
        self.config, self.rho, self.reference = config, rho, reference
        self.proj = nn.Linear(width, width)
        self.scaler = nn.Parameter(torch.tensor(math.log(0.01)))
        self.prototypes = nn.Parameter(torch.randn(config.prototypes, width))
        self.linear_1 = nn.Linear(config.prototypes, 1)
        nn.init.ones_(self.linear_1.weight)
        nn.init.zeros_(self.linear_1.bias)
        if config.head == "disttempnet":
            self.linear_2 = nn.Linear(config.prototypes, 1, bias=False)
            nn.init.ones_(self.linear_2.weight)
        self.register_buffer("initialised", torch.tensor(reference and config.head == "disttempnet"))

    def forward(self, features: Tensor, keep: Tensor | None, first: Tensor | None = None) -> Tensor:
        """Unit, detached `features[b,d]` of its tower, their dropout_mask (None: no dropout) -> temperatures [b].

        With `first[B,d]` as after set_prototypes(first), whose gradient goes to the prototypes; nothing is changed yet.
        """
        prototypes = self.prototypes
        if first is not None:
            prototypes = self._chosen(first) + (prototypes - prototypes.detach())
        hidden = self.proj(features).sigmoid()
        if keep is not None:
            hidden = hidden * keep
        similarity = hidden @ F.normalize(prototypes, dim=1).T  # [b, M]
        weights, gates = (similarity / self.scaler.exp()).softmax(dim=1), similarity.sigmoid()
        head = self._tempnet if self.config.head == "tempnet" else self._disttempnet
        return head(weights, gates)[:, 0]

    @torch.no_grad()
    def set_prototypes(self, rows: Tensor) -> None:
        """Start from the first M of `rows[B,d]`, the other tower's embeddings as they came; alike on every rank.

        Raises ValueError when there are fewer.
        """
        self.prototypes.copy_(self._chosen(rows))
        self.initialised.fill_(True)

    def _chosen(self, rows: Tensor) -> Tensor:
        wanted = self.config.prototypes
        if len(rows) < wanted:
            raise ValueError(
                f"network.prototypes={wanted} are taken from the first global batch, which has {len(rows)} samples:"
                " lower network.prototypes, or raise data.batch_size"
            )
        return rows[:wanted]

    def _tempnet(self, weights: Tensor, gates: Tensor) -> Tensor:
        low, high = self.config.min, self.config.max
        share = 1 / weights.shape[1]
        return low + (high - low) * self.linear_1((weights - share) * gates).sigmoid()

    def _disttempnet(self, weights: Tensor, gates: Tensor) -> Tensor:
        low, high = self.config.min, math.inf if self.config.max is None else self.config.max
        tau = (self.linear_1(weights * gates) - self.linear_2(gates / weights.shape[1])) / self.rho
        return tau.clamp(low, high) if self.reference else _Held.apply(tau, low, high)


class _Held(torch.autograd.Function):
    """Clamp to [low, high] whose gradient passes unless descent along it would lead (further) out.

    A plain clamp kills the gradient outside, so a sample that once fell to the minimum would stay there for ever.
    """

    @staticmethod
    def forward(ctx, value: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(value)
        ctx.ends = low, high
        return value.clamp(low, high)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (value,), (low, high) = ctx.saved_tensors, ctx.ends
        outward = ((value <= low) & (gradient > 0)) | ((value >= high) & (gradient < 0))
        return gradient.masked_fill(outward, 0.0), None, None


def dropout_mask(num_rows: int, width: int, *, p: float, step: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[B, d] of 0 and 1 / (1 - p) for the rows of all ranks, a pure function of `step`.

    Drawn on the CPU, so that it is the same on every device and for every number of ranks.
    """
    generator = torch.Generator().manual_seed(step)
    kept = torch.rand(num_rows, width, generator=generator) >= p
    return kept.to(device=device, dtype=dtype) / (1 - p)
