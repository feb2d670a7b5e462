"""From encoded bytes to pixels: one uint8 view per sample. Models resize and normalise it on the device."""

from __future__ import annotations

import io
import math
import warnings
from functools import lru_cache

import numpy as np
import torch
from open_clip.transform import image_transform
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import Compose

from kd_accel.data.shards import BadSample
from kd_accel.sections import AugmentConfig
from kd_accel.types import ImageInput

# what is found behind the names .jpg, .png and .webp; PIL would also hand EPS to Ghostscript
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


def decode(data: bytes) -> Image.Image:
    """The image as RGB (alpha dropped, palettes looked up, as by open_clip); BadSample if PIL cannot decode it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about EXIF and palette metadata, which nobody reads here
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data), formats=FORMATS).convert("RGB")
    except UnidentifiedImageError:  # its message holds an address, and reasons are the same in every process
        raise BadSample(f"image cannot be decoded: none of {', '.join(FORMATS)}") from None
    except Exception as error:  # broken bytes raise OSError, SyntaxError, ValueError, struct.error and others
        raise BadSample(f"image cannot be decoded: {type(error).__name__}: {error}") from error


def train_view(
    image: Image.Image, size: tuple[int, int], augment: AugmentConfig, rng: np.random.Generator
) -> Tensor:  # [3, H, W] uint8
    """A random crop of `image`, resized (bicubic) to `size` (height, width), perhaps flipped; draws from `rng` only."""
    box = random_box(image.size, augment, rng)
    view = image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)
    if rng.random() < augment.flip:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _pixels(view)


def eval_view(image: Image.Image, wanted: ImageInput) -> Tensor:  # [3, h, w] uint8
    """`image` as the model sees it, before normalisation: equal to open_clip's evaluation transform."""
    return _pixels(_resize(wanted.size, wanted.resize_mode, wanted.interpolation)(image))


def random_box(
    size: tuple[int, int], augment: AugmentConfig, rng: np.random.Generator
) -> tuple[int, int, int, int]:  # left, upper, right, lower
    """The crop of torchvision's RandomResizedCrop, of an image of `size` (width, height): ten tries, else centred."""
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*augment.scale)
        ratio = math.exp(rng.uniform(math.log(augment.ratio[0]), math.log(augment.ratio[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, upper, left + w, upper + h
    # the largest centred box whose aspect ratio is allowed; at least one pixel, where torchvision fails
    ratio = min(max(width / height, augment.ratio[0]), augment.ratio[1])
    w, h = max(min(width, round(height * ratio)), 1), max(min(height, round(width / ratio)), 1)
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


@lru_cache
def _resize(size: tuple[int, int], resize_mode: str, interpolation: str) -> Compose:
    """PIL image -> PIL image: open_clip's evaluation transform without its last two steps, to tensor and normalise."""
    whole = image_transform(size, is_train=False, resize_mode=resize_mode, interpolation=interpolation)
    return Compose(whole.transforms[:-2])


def _pixels(image: Image.Image) -> Tensor:  # [3, H, W] uint8
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
