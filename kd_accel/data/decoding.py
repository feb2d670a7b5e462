"""Encoded images from anywhere, handed to PIL: which formats, and what it says of broken bytes. Needs no torch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, UnidentifiedImageError

from kd_accel.data.source import BadSample

# what is found behind the names .jpg, .png and .webp; PIL would also hand EPS to Ghostscript
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


@contextmanager
def decoding() -> Iterator[None]:
    """What PIL says of broken bytes, as BadSample; of metadata that nobody reads here it says nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except BadSample:
        raise
    except UnidentifiedImageError:  # its message holds an address, and reasons are the same in every process
        raise BadSample(f"image cannot be decoded: none of {', '.join(FORMATS)}") from None
    except Exception as error:  # broken bytes raise OSError, SyntaxError, ValueError, struct.error and others
        raise BadSample(f"image cannot be decoded: {type(error).__name__}: {error}") from error
