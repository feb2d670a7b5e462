"""torch.compile by block: neighbouring operations become one kernel, and blocks that are alike are compiled once.

    check_compiler(device)
    compile_blocks(student)     # before an engine wraps it

What is compiled is the `forward` of a block and not the module: the keys of a state dict stay, and so do the hooks by
which engines gather and release weights around a block, outside of its graph.
"""

from __future__ import annotations

import torch
from torch import nn

from kd_accel.models.depth import BLOCK
from kd_accel.schema import ConfigError

VARIANTS = 64  # of one function: both passes, evaluation, every model, any length; torch stops compiling after 8


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of transformers and the stages of CNNs inside `model`, none of them inside another."""
    found = [(BLOCK.match(name), name, module) for name, module in model.named_modules()]
    return [module for match, name, module in found if match is not None and match[0] == name]


def compile_blocks(model: nn.Module) -> list[nn.Module]:
    """Compile every block inside `model` when it is first called; returns them.

    A second size, as of captions of another length, is compiled once more, and then for any size.
    """
    torch._dynamo.config.recompile_limit = VARIANTS
    blocks = blocks_of(model)
    for block in blocks:
        block.forward = torch.compile(block.forward)
    return blocks


def check_compiler(device: torch.device) -> None:
    """Raises ConfigError where torch cannot compile for `device`."""
    from torch._dynamo.exc import TorchDynamoException  # takes seconds to import

    try:
        torch.compile(torch.nn.functional.silu)(torch.ones(8, device=device))
    except TorchDynamoException as error:
        cause = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(
            "train.compile: torch cannot compile here: install a C++ compiler (on GPUs Triton too), or set"
            f" train.compile=false ({cause})"
        ) from error
