"""The schema of `kd-accel export`; imports no torch."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from kd_accel.schema import Schema


class ExportConfig(Schema):
    """kd-accel export RUN out=FOLDER: a student as a release, with a model card, and in further formats beside it."""

    positional: ClassVar[str] = "model"
    model: str
    """A run (its newest checkpoint), a checkpoint, or a release directory."""
    out: str
    """Folder of the release; it must not exist yet."""
    format: list[Literal["open_clip", "transformers", "onnx"]] = ["open_clip"]
    """open_clip's files are always written; format=open_clip,transformers,onnx adds transformers' and ONNX files."""
    image_from: str | None = None
    """A run, checkpoint or release whose image tower takes the place of the model's own."""
    text_from: str | None = None
    """Likewise the text tower: towers that were distilled apart become one CLIP."""
    logit_scale: float | None = Field(None, gt=0)
    """1 / temperature; null: that of the model, or of the one that the text tower is from."""
    int8: Literal["modelopt", "torchao"] | None = None
    """Quantise the tower of image.onnx without training: modelopt for TensorRT, torchao for ONNX Runtime on CPUs."""
    calibrate: str | None = None
    """Of int8: a folder of pictures, or indexed shards, like those that it will see; 256 of them show the ranges."""
    license: str | None = None
    """Of the weights, in the Hub's words (mit, apache-2.0), for the card."""

    @field_validator("format", mode="before")
    @classmethod
    def _with_commas(cls, value: Any) -> Any:
        return [name.strip() for name in value.split(",")] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _int8_is_whole(self) -> Self:
        if (self.int8 is None) != (self.calibrate is None):
            raise ValueError("int8 and calibrate belong together: give both, or neither")
        if self.int8 is not None and "onnx" not in self.format:
            raise ValueError("int8 is a matter of image.onnx: add onnx to format, or drop int8 and calibrate")
        return self
