"""One model as an encoder of images and texts.

d embedding width.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from kd_accel.models.release import WEIGHTS, read_release, resolve_release
from kd_accel.models.text import encode_text
from kd_accel.models.towers import encode_image
from kd_accel.trim import trimmed
from kd_accel.types import ImageInput, InputContract

_STEP = re.compile(r"step_(\d+)")  # the directory of a checkpoint
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Encoder(Protocol):
    """One model on this rank's device, in eval mode."""

    name: str  # the run's name, else the release directory's; goes into every row
    step: int | None  # of the checkpoint that it comes from
    home: Path  # the run, else the release directory: where its results.jsonl belongs
    embed_dim: int  # d
    device: torch.device
    image_input: ImageInput  # how it wants its pixels
    image_id: str  # sha256 of what decides its image features: weights, preprocessing, precision
    text_id: str  # and of its text features: weights, tokenizer, precision

    def encode_images(self, views: Tensor) -> Tensor:
        """[b, 3, H, W] uint8 views as `image_input` wants them, on any device -> [b, d] raw fp32 on the model's."""

    def encode_texts(self, texts: list[str]) -> Tensor:
        """b texts -> [b, d] raw fp32 on the model's device."""


@dataclass(frozen=True)
class TowersEncoder:
    """Both towers of one release."""

    name: str
    step: int | None
    home: Path
    model: nn.Module
    contract: InputContract
    embed_dim: int
    identity: str  # of weights and precision

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def image_input(self) -> ImageInput:
        return self.contract.image

    @cached_property
    def image_id(self) -> str:
        return _sha256(f"{self.identity} {asdict(self.contract.image)}")

    @cached_property
    def text_id(self) -> str:
        return _sha256(f"{self.identity} {self.contract.text.tokenizer} {self.contract.text.context_length}")

    @torch.no_grad()
    def encode_images(self, views: Tensor) -> Tensor:
        if not len(views):
            return torch.empty(0, self.embed_dim, device=self.device)
        return encode_image(self.model, views.to(self.device, non_blocking=True), self.contract.image).float()

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> Tensor:
        if not texts:
            return torch.empty(0, self.embed_dim, device=self.device)
        tokens = trimmed(self.contract.text.tokenize(texts), self.contract.text.pad)
        return encode_text(self.model, tokens.to(self.device)).float()


def load_encoder(model: str | Path, *, precision: str = "fp32") -> Encoder:
    """The encoder in a run (its newest checkpoint), a checkpoint or a release directory; on the GPU where there is one.

    Raises ConfigError where `model` is none of the three.
    """
    release = resolve_release(str(model)).resolve()
    towers, contract, model_cfg, _ = read_release(release)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, step, home = _origin(release)
    with (release / WEIGHTS).open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    return TowersEncoder(
        name=name,
        step=step,
        home=home,
        model=towers.to(device, _DTYPES[precision]).eval(),
        contract=contract,
        embed_dim=model_cfg["embed_dim"],
        identity=f"{weights} {precision}",
    )


def _origin(release: Path) -> tuple[str, int | None, Path]:
    """(name, step, home) of a release: RUN/checkpoints/step_00001000/student belongs to the run."""
    checkpoint = release.parent
    step = _STEP.fullmatch(checkpoint.name)
    if release.name.startswith("student") and step and checkpoint.parent.name == "checkpoints":
        run = checkpoint.parent.parent
        return run.name, int(step[1]), run
    return release.name, None, release


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
