"""From views as they are loaded to the embeddings of an image tower."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from kd_accel.types import ImageInput


def to_model_input(view: Tensor, wanted: ImageInput, dtype: torch.dtype) -> Tensor:
    """uint8 `view[b,3,H,W]` -> `[b,3,h,w]` on the same device: resized if need be, /255 and normalised in fp32."""
    if tuple(view.shape[-2:]) != wanted.size:
        view = resize(view, list(wanted.size), interpolation=InterpolationMode(wanted.interpolation), antialias=True)
    mean, std = (_per_channel(values, view.device) for values in (wanted.mean, wanted.std))
    return view.float().div_(255).sub_(mean).div_(std).to(dtype)  # in place: on CPU a quarter of the time


def images_at_once(device: torch.device) -> int | None:
    """How many to encode at a time without gradients; None: all.

    On a CPU a few, whose activations stay in its caches and in memory that it has already (docs/speed.md).
    """
    return 16 if device.type == "cpu" else None


def encode_image(model: nn.Module, view: Tensor, wanted: ImageInput, *, at_once: int | None = None) -> Tensor:
    """uint8 `view[b,3,H,W]` -> raw embeddings `[b,d]` in the image tower's dtype, `at_once` rows at a time."""
    # Asked of the parameters and not of their data: under ZeRO-3 the data is elsewhere.
    dtype = next(p.dtype for p in model.visual.parameters() if p.is_floating_point())  # others: int8 rows
    pieces = [view] if at_once is None else view.split(at_once)
    return torch.cat([model.encode_image(to_model_input(piece, wanted, dtype), normalize=False) for piece in pieces])


def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[3, 1, 1], without making the host wait for the device."""
    return torch.tensor(values).view(-1, 1, 1).to(device, non_blocking=True)
