"""Images for shards: checked, and made smaller where they are larger than anybody will look at. Needs no torch."""

from __future__ import annotations

import io

from PIL import Image

from kd_accel.data.decoding import FORMATS, decoding
from kd_accel.data.source import BadSample

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # stored as they come; others become JPEG
MAX_JPEG = 65_500  # pixels of a side


def resized(image: bytes, short_side: int | None, quality: int) -> bytes:
    """`image`, with its shorter side at most `short_side` pixels; never enlarged.

    As it came where that is JPEG, PNG or WebP and small enough, else a JPEG of `quality` (1 to 100). EXIF rotations are
    not applied, as in training. Raises BadSample for what cannot be decoded to the last pixel, or be a JPEG.
    """
    with decoding():
        picture = Image.open(io.BytesIO(image), formats=FORMATS)
        shrink = short_side is not None and min(picture.size) > short_side
        size = _scaled(picture.size, short_side) if short_side is not None and shrink else picture.size
        if picture.format in EXTENSIONS and not shrink:
            picture.load()
            return image
        picture.draft("RGB", size)  # JPEG: decoded at the nearest larger eighth
        smaller = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    return _jpeg(smaller, quality)


def describe(image: bytes) -> tuple[str, int, int]:
    """(extension, width, height) of what `resized` returned."""
    picture = Image.open(io.BytesIO(image), formats=FORMATS)
    assert picture.format is not None, "only a picture that was made here has no format"
    return EXTENSIONS[picture.format], *picture.size


def _scaled(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    scale = short_side / min(size)
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    if max(picture.size) > MAX_JPEG:
        raise BadSample(
            f"image has {picture.width:,} x {picture.height:,} pixels, a side of a JPEG at most {MAX_JPEG:,}"
        )
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.getvalue()
