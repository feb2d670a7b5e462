"""An image and a text tower side by side, either of which may be missing."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_accel.types import ImageInput, TextInput

CLIP_LOG_SCALE = math.log(1 / 0.07)  # where open_clip starts


class TwoTowers(nn.Module):
    """What open_clip's CLIP cannot be: one tower alone, or towers of other packages.

    visual        None, or a module: normalised pixels [b, 3, h, w] -> [b, d]
    text          None, or a module: tokens [b, T] int64 -> [b, d]
    image_input   what `visual` wants, where its package says so
    text_input    what `text` wants, where its package says so

    State keys are those of open_clip's CustomTextCLIP.
    """

    def __init__(
        self,
        visual: nn.Module | None,
        text: nn.Module | None,
        *,
        image_input: ImageInput | None = None,
        text_input: TextInput | None = None,
        log_scale: float = CLIP_LOG_SCALE,
        bias: float | None = None,
    ):
        super().__init__()
        self.visual, self.text = visual, text
        self.image_input, self.text_input = image_input, text_input
        self.logit_scale = nn.Parameter(torch.tensor(log_scale))
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(bias))

    def encode_image(self, pixels: Tensor, normalize: bool = False) -> Tensor:
        """Normalised pixels [b, 3, h, w] -> [b, d]."""
        features = self.visual(pixels)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Tokens [b, T] int64 -> [b, d]."""
        features = self.text(tokens)
        return F.normalize(features, dim=-1) if normalize else features

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass; raises NotImplementedError for a tower that cannot."""
        for tower in filter(None, (self.visual, self.text)):
            if not hasattr(tower, "set_grad_checkpointing"):
                raise NotImplementedError(f"{type(tower).__name__} cannot recompute its activations")
            tower.set_grad_checkpointing(enable)
