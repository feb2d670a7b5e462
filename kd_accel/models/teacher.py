"""The frozen model that is learned from: an open_clip model with its weights, or one of our own students."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kd_accel.models.build import build_teacher
from kd_accel.models.image import encode_image
from kd_accel.models.text import encode_text
from kd_accel.schema import ConfigError
from kd_accel.sections import TeacherConfig
from kd_accel.trim import trimmed
from kd_accel.types import InputContract, TeacherSpec


class Teacher(nn.Module):
    """Frozen: no gradients, always in eval mode, in no checkpoint.

    clip          the open_clip model
    contract      what it wants as input
    towers        of "image" and "text" those it has
    read          those of its towers that are run
    images_at_once   None, or how many rows its image tower sees at a time
    embed_dim     d
    logit_scale   1 / temperature: the configured one, or that it was trained to
    logit_bias    None, or the bias that it was trained to; a softmax over a row does not see it
    spec          what the objective has to know
    """

    def __init__(self, config: TeacherConfig, *, name: str = "teacher", weights: bool = True):
        """Leaves torch's generator as it was: a seed gives the same student with and without a teacher.

        `weights`: false leaves those out that would have to be fetched.

        Raises ConfigError when the model or its weights are not to be had.
        """
        super().__init__()
        key = key_of(name)
        if name in dir(nn.ModuleDict()):
            raise ConfigError(f"{key}: torch's modules have an attribute of that name: give the teacher another")
        with torch.random.fork_rng(devices=[]):
            self.clip, self.contract, self.embed_dim, scale = build_teacher(config, where=key, weights=weights)
        self.towers = tuple(name for name in ("image", "text") if getattr(self.contract, name) is not None)
        self.read = set(self.towers)
        self.images_at_once: int | None = None
        self.logit_scale = 1 / config.temperature if config.temperature else math.exp(scale.log_scale)
        self.logit_bias = scale.bias
        self.spec = TeacherSpec(self.embed_dim, self.logit_scale, config.weight, self.towers)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode: the engine's train() reaches every submodule, and dropout would blur the targets."""
        return super().train(False)

    @property
    def wants(self) -> InputContract:
        """What the towers that run want to see."""
        return self.contract.only(self.read)

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> Tensor:
        """Raw embeddings [b, d] of texts that are no data, for instance prompts."""
        text = self.contract.text
        tokens = trimmed(text.tokenize(captions), text.pad)
        return encode_text(self.clip, tokens.to(next(self.clip.parameters()).device))

    @torch.no_grad()
    def forward(self, image: Tensor | None, text: Tensor | None) -> dict[str, Tensor]:
        """uint8 `image[b,3,H,W]`, int64 `text[b,T]` -> raw embeddings "image", "text" `[b,d]`, without gradient.

        Towers that are not read say nothing.
        """
        features = {}
        if "image" in self.read:
            features["image"] = encode_image(self.clip, image, self.contract.image, at_once=self.images_at_once)
        if "text" in self.read:
            features["text"] = encode_text(self.clip, text)
        return features


def key_of(name: str) -> str:
    """The section of the config that a teacher of this name comes from."""
    return name if name == "teacher" else f"teachers.{name}"
