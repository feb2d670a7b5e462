"""What the members of a sample in a tar are: its image, texts in fields as the config writes them, a class number."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from kd_accel.data.source import BadSample

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")  # the first one that a sample has is its image
MAX_LABEL_DIGITS = 18  # what surely fits into int64


@dataclass(frozen=True)
class Field:
    """Where a text lies: in a member of its own, or under a key of a json member."""

    extension: str
    key: str | None

    @staticmethod
    def parse(text: str) -> Field:
        """`EXTENSION` or `EXTENSION:KEY`."""
        extension, colon, key = text.partition(":")
        return Field(extension, key if colon else None)


def texts_of(found: Iterable[tuple[Field, bytes]], name: str) -> tuple[str, ...]:
    """The texts in those of some fields that a sample has, stripped; raises BadSample where none is there or one empty.

    `name` is what a field is called in the reason: caption.
    """
    said = [_said(content, field, name) for field, content in found]
    if not said:
        raise BadSample(f"{name} member is missing")
    texts = tuple(text.strip() for texts_of_one in said for text in texts_of_one)
    if not (texts and all(texts)):
        raise BadSample(f"{name} is empty")
    return texts


def class_number(text: str) -> int:
    """Raises BadSample for what is no whole number, or one that no label has."""
    text = text.strip()
    if not text.isdecimal() or len(text) > MAX_LABEL_DIGITS:
        raise BadSample(f"label is not a whole number: {text[:20]!r}")
    return int(text)


def _said(content: bytes, field: Field, name: str) -> list[str]:
    try:
        text = content.decode("utf-8")
        value = text if field.key is None else json.loads(text)[field.key]
    except UnicodeDecodeError:
        raise BadSample(f"{name} is not UTF-8") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadSample(f"{name}: .{field.extension} is not JSON with the key {field.key}") from None
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise BadSample(f"{name}: {field.extension}:{field.key} is not text")
    return texts
