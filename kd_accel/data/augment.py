"""Changes of a view after its crop: flips, rotation, RandAugment, colour. Every draw comes from the generator given."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import numpy as np
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from kd_accel.augment_config import AugmentConfig, ColorJitterConfig, RandAugmentConfig

MAX_MAGNITUDE = 30  # RandAugment's strongest


def augmented(view: Image.Image, augment: AugmentConfig, rng: np.random.Generator) -> Image.Image:
    """`view`, changed as `augment` says, in the order of its fields; same size and mode (RGB).

    A change that is switched off draws nothing, the horizontal flip excepted.
    """
    if rng.random() < augment.flip:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if augment.vertical_flip and rng.random() < augment.vertical_flip:
        view = view.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    if augment.rotation:
        view = F.rotate(view, rng.uniform(-augment.rotation, augment.rotation), InterpolationMode.BILINEAR)
    if augment.rand_augment is not None:
        view = rand_augmented(view, augment.rand_augment, rng)
    if augment.color_jitter is not None and rng.random() < augment.color_jitter.probability:
        view = jittered(view, augment.color_jitter, rng)
    if augment.grayscale and rng.random() < augment.grayscale:
        view = F.rgb_to_grayscale(view, num_output_channels=3)
    return view


def changes(augment: AugmentConfig) -> bool:
    """Whether anything at all can happen to a view after its crop."""
    chances = augment.flip, augment.vertical_flip, augment.rotation, augment.grayscale
    return any(chances) or augment.rand_augment is not None or augment.color_jitter is not None


def jittered(view: Image.Image, jitter: ColorJitterConfig, rng: np.random.Generator) -> Image.Image:
    """torchvision's ColorJitter: each strength uniform in its range, the changes in random order."""
    ranges = [
        (F.adjust_brightness, *_around_one(jitter.brightness)),
        (F.adjust_contrast, *_around_one(jitter.contrast)),
        (F.adjust_saturation, *_around_one(jitter.saturation)),
        (F.adjust_hue, -jitter.hue, jitter.hue),
    ]
    drawn = [(change, rng.uniform(low, high)) for change, low, high in ranges if low < high]
    for place in rng.permutation(len(drawn)):
        change, strength = drawn[place]
        view = change(view, strength)
    return view


def rand_augmented(view: Image.Image, config: RandAugmentConfig, rng: np.random.Generator) -> Image.Image:
    """torchvision's RandAugment: `num_ops` of OPS, drawn with replacement; those with a sign go either way."""
    for number in rng.integers(len(OPS), size=config.num_ops):
        change, signed = OPS[number]
        strength = config.magnitude / MAX_MAGNITUDE
        view = change(view, -strength if signed and rng.random() < 0.5 else strength)
    return view


def _around_one(width: float) -> tuple[float, float]:
    return max(0.0, 1 - width), 1 + width


def _shear(view: Image.Image, x: float, y: float) -> Image.Image:
    """By the slopes x and y, about the upper left corner."""
    shear = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    sheared: Image.Image = F.affine(view, angle=0, translate=[0, 0], scale=1, shear=shear, center=[0, 0])
    return sheared


def _translate(view: Image.Image, x: float, y: float) -> Image.Image:
    """By whole pixels."""
    moved: Image.Image = F.affine(view, angle=0, translate=[int(x), int(y)], scale=1, shear=[0, 0])
    return moved


# (image, strength in -1..1) -> image, and whether the strength has a sign; ranges and order as in torchvision
OPS: list[tuple[Callable[[Image.Image, float], Image.Image], bool]] = [
    (lambda view, s: view, False),
    (lambda view, s: _shear(view, 0.3 * s, 0), True),
    (lambda view, s: _shear(view, 0, 0.3 * s), True),
    (lambda view, s: _translate(view, 150 / 331 * view.width * s, 0), True),
    (lambda view, s: _translate(view, 0, 150 / 331 * view.height * s), True),
    (lambda view, s: F.rotate(view, 30 * s), True),
    (lambda view, s: F.adjust_brightness(view, 1 + 0.9 * s), True),
    (lambda view, s: F.adjust_saturation(view, 1 + 0.9 * s), True),
    (lambda view, s: F.adjust_contrast(view, 1 + 0.9 * s), True),
    (lambda view, s: F.adjust_sharpness(view, 1 + 0.9 * s), True),
    (lambda view, s: ImageOps.posterize(view, 8 - round(4 * s)), False),
    (lambda view, s: ImageOps.solarize(view, cast(int, 255 * (1 - s))), False),  # Pillow takes any number
    (lambda view, s: ImageOps.autocontrast(view), False),
    (lambda view, s: ImageOps.equalize(view), False),
]
