"""Several models as one: the mean of their cosines.

The unit rows of k members, side by side and divided by sqrt(k), are unit rows whose dot product is the mean of the
members' cosines. So retrieval and zero-shot need not know of members where they normalise with `unit`, which also makes
a class the mean of its prompts for each member apart.

b rows of a batch, k members, d the sum of the members' widths.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_accel.schema import ConfigError

if TYPE_CHECKING:
    from kd_accel.evals.encoder import Encoder


@dataclass(frozen=True)
class Ensemble:
    """Members of any kind, each with its own preprocessing, tokenizer and width; raw features stand side by side.

    Its images are encoded by one member after the other, each with views of its own: see features.py.
    """

    members: tuple[Encoder, ...]

    @property
    def name(self) -> str:
        return " + ".join(member.name for member in self.members)

    @property
    def step(self) -> int | None:
        """That of all members, if they are of one."""
        steps = {member.step for member in self.members}
        return steps.pop() if len(steps) == 1 else None

    @property
    def title(self) -> str:
        return " + ".join(member.title for member in self.members)

    @property
    def home(self) -> Path:
        """The first member's."""
        return self.members[0].home

    @property
    def towers(self) -> set[str]:
        """Of "image" and "text" those that all members have."""
        return set.intersection(*(member.towers for member in self.members))

    @property
    def embed_dim(self) -> int:
        return sum(member.embed_dim for member in self.members)

    @property
    def device(self) -> torch.device:
        return self.members[0].device

    @property
    def class_head(self) -> None:
        """Heads of several models have no mean of their cosines."""
        return None

    @cached_property
    def image_id(self) -> str:
        return _joined([member.image_id for member in self.members])

    @cached_property
    def text_id(self) -> str:
        return _joined([member.text_id for member in self.members])

    def require(self, *towers: str) -> None:
        """Raises ConfigError for a member that lacks one of `towers` ("image", "text")."""
        for member in self.members:
            member.require(*towers)

    def check_texts(self, texts: list[str]) -> None:
        for member in self.members:
            member.check_texts(texts)

    def templates(self, class_names: tuple[str, ...], templates: tuple[str, ...]) -> tuple[str, ...]:
        """Those that all members use; raises ConfigError where theirs differ."""
        chosen = {member.templates(class_names, templates) for member in self.members}
        if len(chosen) > 1:
            raise ConfigError(
                f"ensemble: {self.name}: to some members class names alone are known, to others prompts: store"
                " the prompts too"
            )
        return chosen.pop()

    def encode_texts(self, texts: list[str]) -> Tensor:
        """b texts -> raw [b, d] fp32."""
        return torch.cat([member.encode_texts(texts).to(self.device) for member in self.members], dim=1)

    def unit(self, features: Tensor) -> Tensor:
        """Raw [..., d] -> unit rows, in which every member weighs alike."""
        parts = features.split([member.embed_dim for member in self.members], dim=-1)
        return torch.cat([F.normalize(part, dim=-1) for part in parts], dim=-1) / math.sqrt(len(parts))


def _joined(ids: list[str]) -> str:
    return hashlib.sha256(" ".join(ids).encode()).hexdigest()
