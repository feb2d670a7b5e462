"""From encoded bytes to pixels: one uint8 view per sample. Models resize and normalise it on the device."""

from __future__ import annotations

import io
import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.transform import image_transform
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torchvision.transforms import Compose

from kd_accel.augment_config import AugmentConfig
from kd_accel.data.augment import augmented, changes
from kd_accel.data.decoding import FORMATS, decoding
from kd_accel.data.source import BadSample
from kd_accel.types import ImageInput

MAX_SIDE = 100_000  # pixels; beside PIL's own bound on their product

Box = tuple[float, float, float, float]  # left, upper, right, lower, in pixels


def decode(data: bytes) -> Image.Image:
    """The image as RGB (alpha dropped, palettes looked up, as by open_clip); BadSample if PIL cannot decode it."""
    return _rgb(_opened(data))


def train_view(
    data: bytes, size: tuple[int, int], augment: AugmentConfig, rng: np.random.Generator
) -> Tensor:  # [3, H, W] uint8
    """A crop of the encoded image, resized (bicubic) to `size` (height, width) and augmented; draws from `rng` only.

    The crop is drawn from the size in the header, so that no more is decoded than it takes. Raises BadSample.
    """
    image = _opened(data)
    box = _reduce(image, crop_box(image.size, size, augment, rng), size)
    view = _resized_crop(_rgb(image), box, size)
    if not changes(augment):
        return view
    return _pixels(augmented(Image.fromarray(view.permute(1, 2, 0).contiguous().numpy()), augment, rng))


def eval_view(image: Image.Image, wanted: ImageInput) -> Tensor:  # [3, h, w] uint8
    """`image` as the model sees it, before normalisation: equal to open_clip's evaluation transform."""
    return _pixels(_resize(wanted.size, wanted.resize_mode, wanted.interpolation)(image))


def crop_box(
    image_size: tuple[int, int], view_size: tuple[int, int], augment: AugmentConfig, rng: np.random.Generator
) -> Box:
    """What of an image of `image_size` (width, height) a view of `view_size` (height, width) shows."""
    if augment.crop == "random":
        return random_box(image_size, augment, rng)
    (width, height), (h, w) = image_size, view_size
    scale = min(width / w, height / h)
    left, upper = (width - scale * w) / 2, (height - scale * h) / 2
    return left, upper, left + scale * w, upper + scale * h


def random_box(size: tuple[int, int], augment: AugmentConfig, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """The crop of torchvision's RandomResizedCrop, of an image of `size` (width, height): ten tries, else centred."""
    width, height = size
    (smallest, largest), (narrowest, widest) = augment.scale, map(math.log, augment.ratio)
    for _ in range(10):
        area = width * height * (smallest + (largest - smallest) * rng.random())  # rng.uniform's bits, in less time
        ratio = math.exp(narrowest + (widest - narrowest) * rng.random())
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, upper, left + w, upper + h
    # the largest centred box whose aspect ratio is allowed; at least one pixel, where torchvision fails
    ratio = min(max(width / height, augment.ratio[0]), augment.ratio[1])
    w, h = max(min(width, round(height * ratio)), 1), max(min(height, round(width / ratio)), 1)
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


@decoding()
def _opened(data: bytes) -> Image.Image:
    """The image by its header, nothing decoded yet."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if max(image.size) > MAX_SIDE:
        raise BadSample(f"image has {image.width:,} x {image.height:,} pixels, a side may have {MAX_SIDE:,}")
    return image


@decoding()
def _rgb(image: Image.Image) -> Image.Image:
    """The decoded pixels; without the copy that convert makes of what is RGB already."""
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def _reduce(image: Image.Image, box: Box, size: tuple[int, int]) -> Box:
    """Let a JPEG be decoded at 1/2, 1/4 or 1/8 where `box` still covers `size` (height, width); where `box` then lies.

    The frequencies that are left out are those that the resize drops anyhow.
    """
    factor = min((box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0])
    scale = next((s for s in (8, 4, 2) if s <= factor), 1)
    if scale == 1 or not isinstance(image, JpegImageFile):
        return box
    image.draft(None, (image.width // scale, image.height // scale))
    left, upper, right, lower = (edge / scale for edge in box)
    return left, upper, right, lower


def _resized_crop(image: Image.Image, box: Box, size: tuple[int, int]) -> Tensor:  # [3, H, W] uint8
    """The box at `size` (height, width), bicubic with antialiasing; of whole pixels as torchvision's resized_crop.

    Those by torch, whose bicubic on bytes takes a third of PIL's time; the two differ by a rounding.
    """
    if any(edge != round(edge) for edge in box):
        return _pixels(image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box))
    left, upper, right, lower = map(int, box)
    pixels = torch.from_numpy(np.array(image))[upper:lower, left:right].permute(2, 0, 1)  # [3, h, w]
    return F.interpolate(pixels[None], size=size, mode="bicubic", antialias=True)[0].contiguous()


@lru_cache
def _resize(size: tuple[int, int], resize_mode: str, interpolation: str) -> Compose:
    """PIL image -> PIL image: open_clip's evaluation transform without its last two steps, to tensor and normalise."""
    whole = image_transform(size, is_train=False, resize_mode=resize_mode, interpolation=interpolation)
    return Compose(whole.transforms[:-2])


def _pixels(image: Image.Image) -> Tensor:  # [3, H, W] uint8
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
