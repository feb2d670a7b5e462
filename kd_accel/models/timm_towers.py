"""Builds an image tower from any timm model, with a head of our width or without one.

    tower, wants = build_timm("mobilenetv3_small_100", embed_dim=512, pretrained=False, where="student.image")
    features = tower(pixels)  # [b,3,h,w], normalised as `wants` says -> [b,512]

A name may carry a tag of its weights, as timm's do: "vit_tiny_patch16_224.augreg_in21k".
"""

from __future__ import annotations

import difflib

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from kd_accel.schema import ConfigError, one_line
from kd_accel.types import ImageInput

RESIZE_MODES = {"center": "shortest", "squash": "squash", "border": "longest"}  # timm's crop modes in open_clip's words


class TimmTower(nn.Module):
    """A timm model as a tower; apart from it, since timm's `embed_dim` is the width of its blocks.

    trunk         the timm model; state keys "trunk.*", as in open_clip
    embed_dim     width of the features
    image_size    pixels; the height, for the few models that want no squares
    """

    def __init__(self, trunk: nn.Module, *, embed_dim: int, image_size: int):
        super().__init__()
        self.trunk, self.embed_dim, self.image_size = trunk, embed_dim, image_size

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised `pixels[b,3,h,w]` -> `[b,d]`."""
        return self.trunk(pixels)

    def set_grad_checkpointing(self, enable: bool) -> None:
        """As open_clip's towers do it. Raises AssertionError where timm has not written it for this model."""
        self.trunk.set_grad_checkpointing(enable)


def build_timm(
    name: str, *, embed_dim: int | None, pretrained: bool, where: str, image_size: int | None = None
) -> tuple[TimmTower, ImageInput]:
    """(tower, what it wants to see) of a timm model, with a classifier of `embed_dim` outputs as its head.

    embed_dim None leaves the classifier out: the tower gives the pooled features that it would read. image_size None is
    the size of the weights. Fresh weights, and a new head, come from torch's global generator. Raises ConfigError,
    which begins with `where`, for an unknown name, a size that does not fit, and weights that cannot be fetched.
    """
    trunk = _trunk(name, embed_dim or 0, pretrained, image_size, where)
    wanted = resolve_model_data_config(trunk)
    size = wanted["input_size"][1:] if image_size is None else (image_size, image_size)
    tower = TimmTower(trunk, embed_dim=embed_dim or trunk.head_hidden_size, image_size=size[0])
    if image_size is not None:
        _check_size(tower, name, where)
    return tower, ImageInput(
        size=size,
        mean=tuple(wanted["mean"]),
        std=tuple(wanted["std"]),
        interpolation=wanted["interpolation"],
        resize_mode=RESIZE_MODES[wanted["crop_mode"]],
    )


def _trunk(name: str, num_classes: int, pretrained: bool, image_size: int | None, where: str) -> nn.Module:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
        hint = f"; did you mean {', '.join(near)}?" if near else "; timm.list_models() lists them"
        raise ConfigError(f"{where}: timm has no model '{name}'{hint}")
    try:
        # Only models that are built for one size know the argument img_size; all others take any size.
        fixed = timm.get_pretrained_cfg(name, allow_unregistered=False).fixed_input_size
        options = {"img_size": image_size} if fixed and image_size else {}
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **options)
    except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as error:
        way_out = "; fix the network, or start without pretrained weights" if pretrained else ""
        raise ConfigError(f"{where}: timm cannot build {name}: {one_line(error)}{way_out}") from error


@torch.no_grad()
def _check_size(tower: TimmTower, name: str, where: str) -> None:
    """timm builds some models for sizes that they cannot take."""
    try:
        tower.eval()(torch.zeros(1, 3, tower.image_size, tower.image_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{where}: {name} cannot take images of {tower.image_size} pixels: {one_line(error)}"
        ) from error
    tower.train()
