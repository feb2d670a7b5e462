"""Running statistics of BatchNorm: fp32 beside bf16 weights, and one mean over all ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kd_accel import distributed

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def running_statistics(module: nn.Module) -> dict[str, Tensor]:
    """Running means and variances inside `module`, and of how many batches they are, by name of the buffer."""
    return {name: b for name, b in module.named_buffers() if name.rpartition(".")[2] in STATISTICS}


def normalises_over_batches(module: nn.Module) -> bool:
    """Whether a BatchNorm inside `module` is trained: a frozen one applies its running statistics."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    return any(not norm.affine or norm.weight.requires_grad for norm in norms)


def allow_bf16_weights(module: nn.Module) -> None:
    """Let every BatchNorm inside `module` compute with bf16 weights and fp32 running statistics.

    DeepSpeed leaves them so: it casts parameters, not buffers. torch's kernels want fp32 weights with fp32 statistics,
    as under autocast; here they see such ones, and gradients come back through the cast.
    """
    for part in module.modules():
        if isinstance(part, _BatchNorm) and part.affine:
            part.register_forward_pre_hook(_show_fp32_weights)
            part.register_forward_hook(_show_own_weights, always_call=True)


@torch.no_grad()
def average_over_ranks(module: nn.Module) -> None:
    """Replace the running statistics inside `module` by their mean over ranks; collective.

    Every rank has met other samples. The mean of moving averages is the moving average of means, so that it does not
    matter how often this is called; in fp64, statistics that are alike on all ranks stay as they are, bit by bit.
    """
    statistics = list(running_statistics(module).values())
    totals = distributed.sum_over_ranks([tensor.double() for tensor in statistics])
    for tensor, total in zip(statistics, totals, strict=True):
        tensor.copy_(total / distributed.world_size())


def _show_fp32_weights(module: nn.Module, _inputs) -> None:
    """For the length of a forward call, attributes hide the parameters of the same names."""
    module.__dict__["weight"], module.__dict__["bias"] = module.weight.float(), module.bias.float()


def _show_own_weights(module: nn.Module, _inputs, _output) -> None:
    module.__dict__.pop("weight", None)
    module.__dict__.pop("bias", None)
