"""class_head.safetensors of a release: the linear layer that makes class logits of raw image embeddings.

weight [C, d], bias [C], fp32; its metadata has "names", a JSON list of C texts, where the training data has them.
C classes, d embedding width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kd_accel.schema import ConfigError

FILE = "class_head.safetensors"


@dataclass(frozen=True)
class ClassHead:
    """What tells the classes apart that a student was trained on."""

    weight: Tensor  # [C, d]
    bias: Tensor  # [C]
    names: tuple[str, ...] | None  # of the classes, where they are known

    @property
    def id(self) -> str:
        """SHA-256 of weights and names."""
        found = hashlib.sha256(json.dumps(self.names).encode())
        for tensor in (self.weight, self.bias):
            found.update(tensor.numpy().tobytes())
        return found.hexdigest()

    def logits(self, embeddings: Tensor) -> Tensor:
        """Raw image embeddings [b, d] -> [b, C] on their device, as the head was trained: without normalisation."""
        return F.linear(embeddings, self.weight.to(embeddings.device), self.bias.to(embeddings.device))

    def probabilities(self, embeddings: Tensor) -> Tensor:
        """Raw image embeddings [b, d] -> [b, C], rows that sum to 1."""
        return self.logits(embeddings).softmax(dim=-1)

    def columns(self, class_names: Sequence[str]) -> list[int] | None:
        """The class of each of `class_names`, None where it does not know them all: by name; or by number, where it has
        as many classes and no name of them, as after training on ImageNet's synsets."""
        wanted = [_as_words(name) for name in class_names]
        known = [_as_words(name) for name in self.names or ()]
        if wanted != known and set(wanted) <= set(known):
            return [known.index(name) for name in wanted]
        by_number = wanted == known or (len(wanted) == len(self.bias) and not set(wanted) & set(known))
        return list(range(len(wanted))) if by_number else None


def write_class_head(folder: Path, head: ClassHead) -> None:
    """Add FILE to `folder`."""
    names = {} if head.names is None else {"names": json.dumps(head.names)}
    tensors = {"weight": head.weight.float().contiguous(), "bias": head.bias.float().contiguous()}
    save_file(tensors, folder / FILE, metadata={"format": "pt"} | names)


def read_class_head(file: Path, embed_dim: int) -> ClassHead:
    """Raises ConfigError, one line, for a file that is missing, damaged or of another model; runs nothing of it."""
    try:
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
            names = (stored.metadata() or {}).get("names")
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file}: truncated, or not safetensors: {error}") from None
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    num_classes = (shapes.get("weight") or [0])[0]
    if num_classes < 2 or shapes != {"weight": [num_classes, embed_dim], "bias": [num_classes]}:
        raise ConfigError(f"{file}: needed are weight [C, {embed_dim}] and bias [C] of C classes; it holds {shapes}")
    if not all(tensor.is_floating_point() and tensor.isfinite().all() for tensor in tensors.values()):
        raise ConfigError(f"{file}: weight and bias must be finite floating-point numbers")
    return ClassHead(tensors["weight"].float(), tensors["bias"].float(), _names(names, num_classes, file))


def _as_words(name: str) -> str:
    """Folders are called red_fox where lists have Red fox."""
    return name.replace("_", " ").casefold()


def _names(text: str | None, num_classes: int, file: Path) -> tuple[str, ...] | None:
    """They are printed on a terminal, which characters that cannot be printed would steer."""
    if text is None:
        return None
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) and name.isprintable() for name in names):
        raise ConfigError(f"{file}: its names are no JSON list of printable texts")
    if len(names) != num_classes:
        raise ConfigError(f"{file}: {len(names)} names of {num_classes} classes")
    return tuple(names)
