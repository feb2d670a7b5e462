"""2:4 sparsity (arXiv 2104.08378): of every four neighbouring weights of an output two are zero, which Ampere and later
GPUs multiply at twice the rate.

The mask is applied in the forward pass: masked weights give nothing, get no gradient, and, zero from the start, stay so
under any optimizer and in whatever master copies an engine keeps. A release then carries the zeros, and nothing else.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d
from torch import Tensor, nn

MASK = "sparsity_mask"  # a buffer beside each sparse weight; in checkpoints, not in releases


class SparseLinear(nn.Linear):
    """A Linear with two weights of four."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _masked(self), self.bias)


class SparseConv2d(nn.Conv2d):
    """A Conv2d with two weights of four."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, _masked(self), self.bias)


KINDS = {nn.Linear: SparseLinear, nn.Conv2d: SparseConv2d}
ATTENTION = nn.MultiheadAttention, AttentionPool2d  # they read the matrices of the layers inside them themselves


@torch.no_grad()
def sparsify(model: nn.Module) -> dict[str, int]:
    """Make every eligible layer inside `model` sparse, by the sizes of its weights; returns how many weights each has.

    Eligible are Linear and Conv2d that are trained, whose inputs are a multiple of 16 and outputs of 8, as the kernels
    want it, and that are used as layers: the matrices inside torch's MultiheadAttention and open_clip's AttentionPool2d
    are not.
    """
    inside_attention = {id(part) for m in model.modules() if isinstance(m, ATTENTION) for part in m.modules()}
    found = {}
    for name, module in model.named_modules():
        if type(module) in KINDS and id(module) not in inside_attention and _fits(module):
            mask = best_two_of_four(module.weight)
            module.weight.mul_(mask)
            module.register_buffer(MASK, mask)
            module.__class__ = KINDS[type(module)]
            found[name] = module.weight.numel()
    return found


def best_two_of_four(weight: Tensor) -> Tensor:  # bool, of the weight's shape
    """Where the two largest of every four neighbouring input channels are; of equal ones the first.

    weight [out, in] or [out, in, kh, kw]. Four neighbours share output and place in the kernel, as TensorRT wants it.
    """
    rows = weight.movedim(1, -1)  # [out, (kh, kw,) in]
    order = rows.abs().unflatten(-1, (-1, 4)).sort(dim=-1, descending=True, stable=True).indices
    kept = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., :2], True)
    return kept.flatten(-2).movedim(-1, 1).contiguous()


def without_masks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state as a dense model has it; the zeros are in the weights."""
    return {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] != MASK}


def _fits(module: nn.Linear | nn.Conv2d) -> bool:
    whole = getattr(module, "groups", 1) == 1
    return (
        module.weight.requires_grad and whole and module.weight.shape[1] % 16 == 0 and module.weight.shape[0] % 8 == 0
    )


def _masked(module: nn.Module) -> Tensor:
    return torch.where(getattr(module, MASK), module.weight, 0)
