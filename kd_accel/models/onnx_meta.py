"""meta.json: what a folder of ONNX files is, beside the files themselves.

    {"format": "kd_accel.onnx/1", "name": "student", "embed_dim": 512, "logit_scale": 100.0, "logit_bias": null,
     "image": {"file": "image.onnx", "input": "image", "output": "image_features", "size": [224, 224],
               "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic",
               "resize_mode": "shortest"},
     "text": {"file": "text.onnx", "input": "text", "output": "text_features", "context_length": 77,
              "tokenizer": "clip_bpe", "options": {}}}

image.onnx: normalised pixels [b, 3, height, width] fp32 -> [b, embed_dim] fp32; text.onnx: tokens [b, context_length]
int64 -> [b, embed_dim] fp32; both for every b, and neither normalises its features. One of them may be null.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from kd_accel.schema import ConfigError, Schema, validate

FILE = "meta.json"
BESIDE = r"^[\w][\w.\-]*$"  # a name, and no way out of the folder
Channels = tuple[float, float, float]


class OnnxImage(Schema):
    """The image tower, and how it wants its pixels."""

    file: str = Field("image.onnx", pattern=BESIDE)
    """Beside meta.json."""
    input: str = "image"
    """Name of the graph's input."""
    output: str = "image_features"
    """Name of the graph's output."""
    size: tuple[int, int]
    """Height and width, in pixels."""
    mean: Channels
    """Of pixels in 0..1; the graph gets (pixels - mean) / std."""
    std: Channels
    """Of pixels in 0..1."""
    interpolation: Literal["bicubic", "bilinear"]
    """Of the resize."""
    resize_mode: Literal["shortest", "longest", "squash"]
    """As in open_clip: what becomes of images that are not square."""


class OnnxText(Schema):
    """The text tower, and how it wants its texts."""

    file: str = Field("text.onnx", pattern=BESIDE)
    """Beside meta.json."""
    input: str = "text"
    """Name of the graph's input."""
    output: str = "text_features"
    """Name of the graph's output."""
    context_length: int = Field(gt=0)
    """Tokens per text, padding included."""
    tokenizer: Literal["clip_bpe", "folder"]
    """clip_bpe: the one that open_clip carries. folder: a tokenizer of transformers, whose files lie beside."""
    options: dict[str, Any] = {}
    """Further arguments of open_clip's SimpleTokenizer or HFTokenizer, for instance {"clean": "canonicalize"}."""


class OnnxMeta(Schema):
    """All of meta.json."""

    format: Literal["kd_accel.onnx/1"] = "kd_accel.onnx/1"
    """Of this file."""
    name: str
    """Of the model, for people."""
    embed_dim: int = Field(gt=0)
    """Width of the features."""
    logit_scale: float
    """1 / temperature: logits are logit_scale * cosine + logit_bias."""
    logit_bias: float | None = None
    """null: none."""
    image: OnnxImage | None = None
    """null: no image tower."""
    text: OnnxText | None = None
    """null: no text tower."""
    class_head: str | None = Field(None, pattern=BESIDE)
    """File beside meta.json (models/class_head.py): class logits of raw image features; null: none."""

    @model_validator(mode="after")
    def _a_tower(self) -> Self:
        if self.image is None and self.text is None:
            raise ValueError("neither image nor text is given: a model has one of them at least")
        return self

    def to_json(self) -> str:
        """The file's text; `from_json` reads it back to an equal record."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, file: Path) -> OnnxMeta:
        """Raises ConfigError that begins with `file` for what is missing or is no such record."""
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"{file}: no such file; a folder of ONNX files has it, with sizes and tokenizer"
            ) from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file}: cannot be read: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{file}: expected an object with format, name, embed_dim, image, text")
        try:
            return validate(cls, values)
        except ConfigError as error:
            raise ConfigError("\n".join(f"{file}: {line}" for line in str(error).splitlines())) from None
