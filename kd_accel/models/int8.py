"""Weight-only int8: every weight of two or more dimensions as 8-bit integers, one scale per row of its first dimension.

    quantise(teacher)

Symmetric: row = integers * scale with scale = max |row| / 127, so a weight is off by at most scale / 2. A weight is
multiplied out when it is used, in the dtype that the module was last cast to, and forgotten after that.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Int8Rows(nn.Module):
    """What stands between a weight as it is kept and as it is used."""

    def __init__(self):
        super().__init__()
        self.register_buffer("like", torch.empty(0), persistent=False)  # follows .to(dtype), as the weight did

    def forward(self, integers: Tensor, scale_bits: Tensor) -> Tensor:
        """int8 `integers[r,...]`, the bits of fp32 scales `[r,1,...]` -> the weight."""
        return (integers * scale_bits.view(torch.float32)).to(self.like.dtype)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The scales travel as int32, because .to(bfloat16) leaves integers alone."""
        rows = weight.float()
        scale = rows.abs().amax(dim=tuple(range(1, rows.ndim)), keepdim=True) / 127
        integers = (rows / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8)
        return integers, scale.view(torch.int32)


def quantise(module: nn.Module) -> None:
    """Keep the weights of a frozen fp32 module in int8; its features stay those of the weights as they are rounded."""
    assert not any(parameter.requires_grad for parameter in module.parameters()), "int8 weights cannot be trained"
    for part in list(module.modules()):
        for name, weight in list(part.named_parameters(recurse=False)):
            if weight.ndim > 1:
                parametrize.register_parametrization(part, name, Int8Rows(), unsafe=True)
