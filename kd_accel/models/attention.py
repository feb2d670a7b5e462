"""Self-attention of open_clip's blocks, without the copies that torch's nn.MultiheadAttention makes on the way.

pack_attention(model)    # same weights, same keys, same features up to rounding

For models that train or are learned from. A release is computed as open_clip does it, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PackedAttention(nn.MultiheadAttention):
    """Queries, keys and values come from one product, and attention reads them where it has put them.

    torch copies them apart, and multiplies a transposed view, which is slower. What is more than self-attention
    without weights (other keys, padding masks) it still computes itself.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """Rows `query[b,t,d]`; `attn_mask[t,t]` or `[b * heads,t,t]`, True where nobody looks, or what is added."""
        plain = not args and kwargs.keys() <= {"need_weights", "attn_mask"} and kwargs.get("need_weights") is False
        if not plain or query is not key or key is not value or query.ndim != 3:
            return super().forward(query, key, value, *args, **kwargs)
        b, t, d = query.shape
        packed = F.linear(query, self.in_proj_weight, self.in_proj_bias)
        q, k, v = packed.view(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        mask = self._mask(kwargs.get("attn_mask"), q)
        seen = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return F.linear(seen.transpose(1, 2).reshape(b, t, d), self.out_proj.weight, self.out_proj.bias), None

    def _mask(self, mask: Tensor | None, query: Tensor) -> Tensor | None:
        """As scaled_dot_product_attention wants it: True where one looks, and one for each head."""
        if mask is None:
            return None
        mask = ~mask if mask.dtype == torch.bool else mask.to(query.dtype)
        return mask if mask.ndim == 2 else mask.view(-1, self.num_heads, *mask.shape[-2:])


def pack_attention(model: nn.Module) -> None:
    """Let every nn.MultiheadAttention inside `model` work so, if it can: one width, batch first, no keys of its own."""
    for module in model.modules():
        if type(module) is nn.MultiheadAttention and module.batch_first and module._qkv_same_embed_dim:
            if module.bias_k is None and not module.add_zero_attn:
                module.__class__ = PackedAttention
