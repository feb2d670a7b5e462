"""int8.safetensors of a release: what the quantisers of its image tower hold beside the float weights.

A reader that knows nothing of it has an ordinary float model; with it the quantised image.onnx can be made again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kd_accel.schema import ConfigError

FILE = "int8.safetensors"
BACKENDS = ("modelopt", "torchao")


@dataclass(frozen=True)
class Int8State:
    """By key of the quantised tower, and which backend of kd_accel.int8 made it."""

    backend: str
    tensors: dict[str, Tensor]


def write_int8(held: Int8State, directory: Path) -> None:
    """Write FILE."""
    tensors = {key: tensor.contiguous() for key, tensor in held.tensors.items()}
    save_file(tensors, directory / FILE, metadata={"format": "pt", "backend": held.backend})


def read_int8(directory: Path) -> Int8State | None:
    """None where the release has no FILE. Raises ConfigError for a damaged one, and one of an unknown backend."""
    file = directory / FILE
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            backend = (opened.metadata() or {}).get("backend")
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file}: truncated, or not safetensors: {error}") from None
    if backend not in BACKENDS:
        raise ConfigError(f"{file}: its metadata names the backend {backend!r}, known are {', '.join(BACKENDS)}")
    return Int8State(backend, tensors)
