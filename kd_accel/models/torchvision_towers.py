"""Builds an image tower from torchvision's classifiers, with a head of our width or without one.

    tower, wants = build_torchvision("resnet50", embed_dim=300, pretrained=False, where="student.image")
    features = tower(pixels)  # [b,3,h,w], normalised as `wants` says -> [b,300]

State keys are torchvision's own.
"""

from __future__ import annotations

import sys

from torch import nn
from torchvision import models

from kd_accel.schema import ConfigError, did_you_mean, one_line
from kd_accel.types import ImageInput

# These two have classifiers half way up, and a switch that turns ImageNet's normalisation of their input into this one.
AUXILIARY = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}
AUXILIARY_MEAN = AUXILIARY_STD = (0.5, 0.5, 0.5)


def build_torchvision(
    name: str, *, embed_dim: int | None, pretrained: bool, where: str, image_size: int | None = None
) -> tuple[nn.Module, ImageInput]:
    """(tower, what it wants to see) of a torchvision classifier: normalised pixels [b,3,h,w] -> [b, tower.embed_dim].

    embed_dim None leaves the head out: the tower gives the pooled features that its classifier would read. Fresh
    weights, and a new head, come from torch's global generator; `pretrained` takes torchvision's best weights of that
    name. image_size None is that of those weights, which resize a little larger and crop; we resize to it.
    Raises ConfigError, which begins with `where`, for an unknown name and for weights that cannot be fetched.
    """
    known = models.list_models(module=models)
    if name not in known:
        raise ConfigError(f"{where}: torchvision has no classifier '{name}'{did_you_mean(name, known)}")
    tower = _classifier(name, pretrained, image_size, where)
    tower.embed_dim = _swap_head(tower, embed_dim)
    wanted = models.get_model_weights(name).DEFAULT.transforms()
    tower.image_size = image_size or getattr(tower, "image_size", wanted.crop_size[0])
    return tower, ImageInput(
        size=(tower.image_size, tower.image_size),
        mean=AUXILIARY_MEAN if name in AUXILIARY else tuple(wanted.mean),
        std=AUXILIARY_STD if name in AUXILIARY else tuple(wanted.std),
        interpolation=wanted.interpolation.value,
        resize_mode="shortest",
    )


def _classifier(name: str, pretrained: bool, image_size: int | None, where: str) -> nn.Module:
    """torchvision's model of 1000 classes, without classifiers half way up."""
    weights = "DEFAULT" if pretrained else None
    options = {"transform_input": False, "init_weights": not pretrained} if name in AUXILIARY else {}
    if image_size is not None and name.startswith("vit_"):
        options["image_size"] = image_size  # these know the size of their position embeddings; all others take any
    try:
        model = models.get_model(name, weights=weights, progress=sys.stderr.isatty(), **options)
    except (EOFError, OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{where}: torchvision's weights of {name} are not in the cache and cannot be fetched: fix the network, or"
            f" start without pretrained weights ({one_line(error)})"
        ) from error
    if name in AUXILIARY:
        model.aux_logits = False
        for head in AUXILIARY[name]:
            setattr(model, head, None)
    return model


def _swap_head(model: nn.Module, embed_dim: int | None) -> int:
    """Replace the last layer by a fresh one of `embed_dim`, or by nothing; returns the width of the output.

    A fresh layer even where torchvision would build one of that width: its vision transformers start theirs at zero.
    """
    if isinstance(model, models.SqueezeNet):
        return _swap_convolution(model, embed_dim)
    name, last = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    if embed_dim is None:
        model.set_submodule(name, nn.Identity())
        return last.in_features
    model.set_submodule(name, nn.Linear(last.in_features, embed_dim, bias=last.bias is not None))
    return embed_dim


def _swap_convolution(model: models.SqueezeNet, embed_dim: int | None) -> int:
    """SqueezeNet classifies by a 1x1 convolution before the pooling; its ReLU would leave embeddings without signs."""
    dropout, last, _, pool = model.classifier
    if embed_dim is None:
        model.classifier = nn.Sequential(pool)
        return last.in_channels
    model.classifier = nn.Sequential(dropout, nn.Conv2d(last.in_channels, embed_dim, kernel_size=1), pool)
    return embed_dim
