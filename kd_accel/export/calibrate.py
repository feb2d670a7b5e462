"""INT8 after training: pictures show the ranges of a float image tower, and no weight moves.

The quick option beside training as int8 (compress.int8); what it costs stands in the card, as cosines between int8 and
float features of those pictures.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_accel.data.open import open_one
from kd_accel.data.source import BadSample, Source
from kd_accel.data.transforms import decode, eval_view
from kd_accel.data_config import SourceConfig
from kd_accel.export.assemble import Exported
from kd_accel.int8 import Int8Tower, backend
from kd_accel.models.image import to_model_input
from kd_accel.models.int8_state import Int8State, write_int8
from kd_accel.schema import ConfigError
from kd_accel.types import ImageInput

NUM_PICTURES, ROWS = 256, 64  # spread evenly over the source; so many at a time


@dataclass(frozen=True)
class Agreement:
    """How near int8 features are to float ones: cosines over the pictures that showed the ranges."""

    num_pictures: int
    mean: float
    lowest: float

    def __str__(self) -> str:
        return f"cosine of int8 and float features {self.mean:.4f} on average, {self.lowest:.4f} at least"


def check_float(exported: Exported, given: str) -> None:
    """Raises ConfigError, beginning with `given`, for what has no image tower, or one that is quantised already."""
    if exported.contract.image is None:
        raise ConfigError(f"{given}: quantises the image tower, and this model has none: leave int8 and calibrate out")
    if exported.int8 is not None:
        raise ConfigError(
            f"{given}: this model has int8.safetensors, so it is quantised already: leave int8 and calibrate out"
        )


def quantise(
    folder: Path, name: str, pictures: str, *, model: nn.Module, image: ImageInput
) -> tuple[Int8Tower, Agreement]:
    """The image tower of `model`, fp32 on the CPU, as int8 by backend `name`; adds int8.safetensors to its release.

    Raises ConfigError for pictures that are not to be had, and where the backend is not installed.
    """
    maker = backend(name)
    batches = read_pictures(pictures, image)
    tower = maker.insert(deepcopy(model.visual), batches).eval()
    write_int8(Int8State(name, maker.split(tower.state_dict())[1]), folder)
    with torch.no_grad():
        cosines = torch.cat([F.cosine_similarity(tower(batch), model.visual(batch), dim=-1) for batch in batches])
    return Int8Tower(tower, maker), Agreement(len(cosines), cosines.mean().item(), cosines.min().item())


def read_pictures(given: str, image: ImageInput) -> list[Tensor]:  # [b, 3, h, w] each
    """Normalised pixels of NUM_PICTURES pictures of a folder, or of shards, or of all where there are fewer.

    Unreadable ones are left out. Raises ConfigError where none is left.
    """
    source = _open(given)
    places = np.linspace(0, source.num_samples, min(NUM_PICTURES, source.num_samples), endpoint=False).astype(int)
    views, reasons = [], []
    for sample_id in places.tolist():
        try:
            views.append(eval_view(decode(source.read(sample_id).image), image))
        except BadSample as error:
            reasons.append(error.reason)
    if not views:
        raise ConfigError(f"calibrate={given}: none of {len(places)} pictures can be read, the first: {reasons[0]}")
    return [to_model_input(torch.stack(views[i : i + ROWS]), image, torch.float32) for i in range(0, len(views), ROWS)]


def _open(given: str) -> Source:
    shards = given.endswith(".tar") or any(Path(given).glob("*.tar"))
    section = SourceConfig(shards=given) if shards else SourceConfig(folder=given)
    try:
        return open_one(section, images=True, captions=False)
    except ConfigError as error:
        reason = str(error).removeprefix("data.folder: ").removeprefix("data.shards: ")
        raise ConfigError(f"calibrate={given}: {reason}") from None
