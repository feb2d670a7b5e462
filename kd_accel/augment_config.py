"""How the images of training are varied: the section data.augment. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from kd_accel.schema import Schema


class ColorJitterConfig(Schema):
    """Random changes of colour, in random order (torchvision's ColorJitter)."""

    brightness: float = Field(0.0, ge=0)
    """The factor lies in max(0, 1 - brightness)..1 + brightness."""
    contrast: float = Field(0.0, ge=0)
    """Likewise."""
    saturation: float = Field(0.0, ge=0)
    """Likewise."""
    hue: float = Field(0.0, ge=0, le=0.5)
    """Turned by -hue..hue of the colour circle."""
    probability: float = Field(1.0, ge=0, le=1)
    """Share of the views that are changed at all (open_clip's color_jitter_prob)."""


class RandAugmentConfig(Schema):
    """RandAugment (arXiv 1909.13719): num_ops of 14 changes of shape and colour, all of one strength."""

    num_ops: int = Field(2, gt=0)
    """Changes per view, drawn with replacement."""
    magnitude: int = Field(9, ge=0, le=30)
    """Strength, on torchvision's scale of 31 steps."""


class AugmentConfig(Schema):
    """Training augmentation in this order; every draw is a pure function of (seed, epoch, sample id)."""

    crop: Literal["random", "center"] = "random"
    """random: torchvision's RandomResizedCrop. center: the largest box in the middle that has the view's shape."""
    scale: tuple[float, float] = (0.9, 1.0)
    """Area of the random crop, as a share of the image (open_clip's default); nothing to crop=center."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """Aspect ratio of the random crop, width / height; nothing to crop=center."""
    flip: float = Field(0.0, ge=0, le=1)
    """Probability of a horizontal flip; captions with left and right do not survive one."""
    vertical_flip: float = Field(0.0, ge=0, le=1)
    """Probability of turning the view upside down."""
    rotation: float = Field(0.0, ge=0, le=180)
    """Degrees: each view is rotated by an angle in -rotation..rotation; corners become black."""
    rand_augment: RandAugmentConfig | None = None
    """RandAugment (arXiv 1909.13719); null: none."""
    color_jitter: ColorJitterConfig | None = None
    """torchvision's ColorJitter; null: none."""
    grayscale: float = Field(0.0, ge=0, le=1)
    """Probability of a view without colour."""

    @field_validator("scale", "ratio")
    @classmethod
    def _ordered(cls, value: Any) -> Any:
        if not 0 < value[0] <= value[1]:
            raise ValueError("expected two positive numbers, the smaller first")
        return value
