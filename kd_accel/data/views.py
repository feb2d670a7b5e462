"""One decoded and augmented view per sample, which all models share: a pure function of (seed, epoch, sample id).

Where features of views are stored, the views are those of the store: (seed of the store, epoch modulo its views, id).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from kd_accel.augment_config import AugmentConfig
from kd_accel.data.source import Sample
from kd_accel.data.transforms import train_view
from kd_accel.schema import ConfigError
from kd_accel.types import InputContract


@dataclass(frozen=True)
class Views:
    """How the view of a sample is made."""

    size: tuple[int, int]  # height, width
    augment: AugmentConfig
    seed: int
    count: int | None = None  # different views of a sample; None: another one in every epoch

    def make(self, sample: Sample, epoch: int) -> Tensor:  # [3, H, W] uint8
        """The view of `sample` in `epoch`; raises BadSample."""
        assert sample.image is not None, "only what was read has views"
        view = epoch if self.count is None else epoch % self.count
        rng = np.random.default_rng([self.seed, view, sample.id])
        return train_view(sample.image, self.size, self.augment, rng)


def largest(contracts: Iterable[InputContract]) -> tuple[int, int] | None:
    """Height and width that hold what every model wants to see; None where none has an image tower."""
    sizes = [contract.image.size for contract in contracts if contract.image is not None]
    if not sizes:
        return None
    heights, widths = zip(*sizes, strict=True)
    return max(heights), max(widths)


def shared_views(wanted: Views | None, stored: dict[str, Views]) -> Views | None:
    """The views to train on: `wanted`, unless stores hold features of other ones.

    Raises ConfigError when stores disagree, when their augmentation is not the wanted one, and when a model wants to
    see more pixels than the stored views had.
    """
    if wanted is None or not stored:
        return wanted
    (name, views), *others = stored.items()
    for other, theirs in others:
        if theirs != views:
            raise ConfigError(f"the stores of {name} and {other} hold features of different views: embed both alike")
    if views.augment != wanted.augment:
        raise ConfigError(
            f"data.augment: the store of {name} holds features of views augmented by {_words(views.augment)}, this run"
            f" asks for {_words(wanted.augment)}: take the store's, or embed again"
        )
    if any(ours > theirs for ours, theirs in zip(wanted.size, views.size, strict=True)):
        raise ConfigError(
            f"the store of {name} holds features of views of {views.size[0]} x {views.size[1]} pixels, but a model of"
            f" this run wants {wanted.size[0]} x {wanted.size[1]}: embed again with this config"
        )
    return views


def _words(augment: AugmentConfig) -> str:
    changed = augment.model_dump(exclude_defaults=True)
    return ", ".join(f"{key}={value}" for key, value in changed.items()) or "the defaults"
