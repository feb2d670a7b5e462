"""INT8 quantisation-aware training of the image tower (arXiv 1712.05877): it learns with weights and activations that
are rounded as 8-bit integers are, and its image.onnx has those integers.

    modelopt.py   NVIDIA's Model Optimizer: symmetric, Q/DQ as TensorRT reads it
    torchao.py    PT2E: 8-bit activations with a zero point, for ONNX Runtime on CPUs

Both have the same three functions; a tower maps normalised pixels [b, 3, H, W] to [b, d]:

    insert(tower, batches)       the tower with fake quantisers, their ranges from batches of pixels; keys stay
    split(state)                 (what the float tower has, what the quantisers hold) of such a tower's state
    write(tower, file, example)  image.onnx
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from kd_accel.models.int8_state import FILE, Int8State
from kd_accel.models.release import read_release
from kd_accel.schema import ConfigError, one_line

EXTRAS = {"modelopt": "quant", "torchao": "quant-cpu"}
TOWER = "visual."  # where open_clip's models keep it


def backend(name: str) -> ModuleType:
    """kd_accel.int8.modelopt or .torchao. Raises ConfigError where the package behind it is not installed."""
    try:
        return import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != name:
            raise
        raise ConfigError(
            f'int8 by {name} needs the extra "{EXTRAS[name]}": pip install "kd-accel[{EXTRAS[name]}]"'
        ) from None


def split_clip(name: str, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], Int8State]:
    """(a float CLIP's state, what the quantisers hold) of the state of a CLIP whose image tower backend `name` made."""
    inside = {key.removeprefix(TOWER): tensor for key, tensor in state.items() if key.startswith(TOWER)}
    tower, held = backend(name).split(inside)
    rest = {key: tensor for key, tensor in state.items() if not key.startswith(TOWER)}
    return rest | {f"{TOWER}{key}": tensor for key, tensor in tower.items()}, Int8State(name, held)


@dataclass(frozen=True)
class Int8Tower:
    """The image tower of a release with its quantisers; fp32 on the CPU, in eval mode."""

    tower: nn.Module
    backend: ModuleType

    def write(self, file: Path, example: Tensor) -> None:
        """As ONNX: "image" [b, 3, H, W], of which `example` is one -> "image_features" [b, d], b free."""
        self.backend.write(self.tower, file, example)


def restore(directory: Path, held: Int8State) -> Int8Tower:
    """The tower that a release's weights and int8.safetensors describe. Raises ConfigError where they do not fit."""
    model, contract, _, _ = read_release(directory)
    maker = backend(held.backend)
    weights = model.visual.state_dict()
    tower = maker.insert(model.visual, [torch.zeros(2, 3, *contract.image.size)])  # ranges come with `held`
    try:
        tower.load_state_dict(weights | held.tensors)
    except RuntimeError as error:
        raise ConfigError(f"{directory / FILE}: not of this model's image tower: {one_line(error)}") from None
    return Int8Tower(tower.eval(), maker)
