"""What an evaluation asks of a tower, and the towers of a torch model: whatever has weights and an InputContract.

b rows of a batch, d embedding width.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kd_accel.models.image import encode_image, images_at_once
from kd_accel.models.text import encode_text
from kd_accel.trim import trimmed
from kd_accel.types import ImageInput, TextInput

# What they become tells tokenizers apart, wherever their files lie.
SENTENCES = [
    "a photo of a cat.",
    "Two DOGS, it's  a na\u00efve caf\u00e9 &amp; 3.14!",
    "\u732b \U0001f600",
    "",
    "long " * 99,
]


class ImageTower(Protocol):
    """uint8 views [b, 3, H, W], made by eval_view(image, wants) -> raw features [b, d] fp32 on `device`."""

    wants: ImageInput
    embed_dim: int  # d
    device: torch.device
    id: str  # SHA-256 of all that decides features

    def __call__(self, views: Tensor) -> Tensor: ...


class TextTower(Protocol):
    """b texts -> raw features [b, d] fp32 on `device`."""

    embed_dim: int  # d
    device: torch.device
    id: str  # SHA-256 of all that decides features

    def check(self, texts: list[str]) -> None:
        """Raises ConfigError for texts that it does not know."""

    def templates(self, class_names: tuple[str, ...], templates: tuple[str, ...]) -> tuple[str, ...]:
        """Of `templates`, with the placeholder {c}, those to put class names into."""

    def __call__(self, texts: list[str]) -> Tensor: ...


@dataclass(frozen=True)
class ModelImages:
    """The image tower of `model`, on its device and in its precision; features are fp32 whatever it computes in."""

    model: nn.Module
    wants: ImageInput
    embed_dim: int  # d

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def id(self) -> str:
        """SHA-256 of weights in their precision, structure and preprocessing; takes about 2 s per GB of weights."""
        return _sha256(self.model, "image", asdict(self.wants))

    @torch.no_grad()
    def __call__(self, views: Tensor) -> Tensor:
        """[b, 3, H, W] uint8 views, on any device -> raw [b, d] fp32 on the tower's."""
        if not len(views):
            return torch.empty(0, self.embed_dim, device=self.device)
        views = views.to(self.device, non_blocking=True)
        return encode_image(self.model, views, self.wants, at_once=images_at_once(self.device)).float()


@dataclass(frozen=True)
class ModelTexts:
    """The text tower of `model`, like ModelImages. It knows every text, with any prompt around it."""

    model: nn.Module
    wants: TextInput
    embed_dim: int  # d

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def id(self) -> str:
        """SHA-256 of weights in their precision, structure, and what the tokenizer makes of some sentences."""
        return _sha256(self.model, "text", [self.wants.pad, self.wants.tokenize(SENTENCES).tolist()])

    def check(self, texts: list[str]) -> None:
        """Every text is fine."""

    def templates(self, class_names: tuple[str, ...], templates: tuple[str, ...]) -> tuple[str, ...]:
        """All of them."""
        return templates

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        """b texts -> raw [b, d] fp32 on the tower's device."""
        if not texts:
            return torch.empty(0, self.embed_dim, device=self.device)
        tokens = trimmed(self.wants.tokenize(texts), self.wants.pad)
        return encode_text(self.model, tokens.to(self.device)).float()


def _sha256(model: nn.Module, tower: str, inputs: Any) -> str:
    """Of one tower: the image tower is `model.visual`, and the text tower all the rest, as in open_clip."""
    found = hashlib.sha256(json.dumps(inputs).encode())
    for name, module in model.named_modules():
        if _belongs(name, tower):
            found.update(f"{name} {type(module).__name__} {_settings(module)}\n".encode())
    for name, tensor in sorted(model.state_dict().items()):
        if _belongs(name, tower):
            found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def _belongs(name: str, tower: str) -> bool:
    return (name.partition(".")[0] == "visual") == (tower == "image")


def _settings(module: nn.Module) -> dict[str, Any]:
    """Heads, strides, kind of pooling: what changes features and is no weight. Not where transformers found it."""
    return {
        name: value
        for name, value in sorted(vars(module).items())
        if isinstance(value, int | float | str) and name[0] != "_" and name not in ("training", "name_or_path")
    }
