"""An image and a text tower side by side, either of which may be missing."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.model import _build_text_tower, _build_vision_tower
from torch import Tensor, nn


class TwoTowers(nn.Module):
    """For what open_clip's CLIP cannot be: one tower alone, or towers of other packages; its state keys are those of
    open_clip's CustomTextCLIP.

    visual   None, or a module with image_size: normalised pixels [b, 3, h, w] -> [b, d]
    text     None, or a module: tokens [b, T] int64 -> [b, d]
    """

    def __init__(
        self,
        embed_dim: int,
        vision_cfg: dict[str, Any] | None = None,
        text_cfg: dict[str, Any] | None = None,
        quick_gelu: bool = False,
        init_logit_scale: float = math.log(1 / 0.07),
        init_logit_bias: float | None = None,
    ):
        super().__init__()
        self.visual = None if vision_cfg is None else _build_vision_tower(embed_dim, vision_cfg, quick_gelu)
        self.text = None if text_cfg is None else _build_text_tower(embed_dim, text_cfg, quick_gelu)
        self.logit_scale = nn.Parameter(torch.tensor(init_logit_scale))
        self.logit_bias = None if init_logit_bias is None else nn.Parameter(torch.tensor(init_logit_bias))

    def encode_image(self, pixels: Tensor, normalize: bool = False) -> Tensor:
        """Normalised pixels [b, 3, h, w] -> [b, d]."""
        features = self.visual(pixels)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Tokens [b, T] int64 -> [b, d]."""
        features = self.text(tokens)
        return F.normalize(features, dim=-1) if normalize else features

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass, in every tower."""
        for tower in (self.visual, self.text):
            if tower is not None:
                tower.set_grad_checkpointing(enable)
