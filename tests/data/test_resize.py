"""Images of shards: untouched where nothing is to be done, else smaller in proportion, and refused when broken."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from kd_accel.data.resize import describe, resized
from kd_accel.data.source import BadSample


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def gradient(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth, so that resizing it has one right answer."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("short_side", [None, 30, 31])
def test_what_is_small_enough_stays_as_it_came(kind, short_side):
    """Not a byte is changed, so nothing is lost by a second JPEG."""
    image = encoded(gradient(40, 30), kind)
    assert resized(image, short_side, 50) == image
    assert describe(image) == ({"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind], 40, 30)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize(("size", "expected"), [((400, 100), (200, 50)), ((100, 301), (50, 150)), ((90, 90), (50, 50))])
def test_what_is_larger_is_scaled_to_its_shorter_side(kind, size, expected):
    """In proportion, rounded to whole pixels, and it is the same picture."""
    small = resized(encoded(gradient(*size), kind), 50, 95)
    assert describe(small) == ("jpg", *expected)
    difference = np.abs(np.asarray(Image.open(io.BytesIO(small)), float) - np.asarray(gradient(*expected), float))
    assert difference.mean() < 5  # of 255: GIF has 256 colours


@pytest.mark.parametrize("kind", ["GIF", "BMP"])
def test_formats_that_shards_do_not_hold_become_jpeg(kind):
    """At their size."""
    assert describe(resized(encoded(gradient(40, 30), kind), None, 90)) == ("jpg", 40, 30)


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGBA", "PNG"), ("P", "PNG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("1", "PNG")]
)
def test_every_mode_of_pixels(mode, kind):
    """Alpha is dropped and palettes are looked up, as in training."""
    assert describe(resized(encoded(gradient(80, 60, mode), kind), 30, 90)) == ("jpg", 40, 30)


def test_quality_decides_the_bytes():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), dtype=np.uint8))
    sizes = [len(resized(encoded(noise, "PNG"), 50, quality)) for quality in (20, 60, 95)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2]


@pytest.mark.parametrize("short_side", [None, 10])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_broken_image_is_refused(kind, short_side):
    """Also when only its last pixels are missing."""
    for image in [encoded(gradient(300, 300), kind)[:-200], b"<html>", b""]:
        with pytest.raises(BadSample, match="image cannot be decoded"):
            resized(image, short_side, 90)


def test_what_is_too_long_for_a_jpeg_is_refused():
    """Its sides end at 65,500 pixels."""
    with pytest.raises(BadSample, match="image has 70,000 x 20 pixels, a side of a JPEG at most 65,500"):
        resized(encoded(Image.new("L", (70_000, 20)), "BMP"), None, 90)


def test_an_image_of_far_too_many_pixels_is_refused():
    """Before they are unpacked."""
    bomb = encoded(Image.new("1", (20_000, 10_000)), "PNG")
    with pytest.raises(BadSample, match="DecompressionBombError"):
        resized(bomb, 224, 90)
