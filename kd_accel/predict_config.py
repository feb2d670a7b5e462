"""The schema of `kd-accel predict`; imports no torch."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, model_validator

from kd_accel.schema import Schema


class PredictConfig(Schema):
    """kd-accel predict MODEL IMAGE [IMAGE ...] prompts=FILE: which of the texts fits each picture, and how well.

    A student with a class head (student.num_classes) needs no texts."""

    positional: ClassVar[tuple[str, ...]] = ("model", "images")
    model: str
    """Whatever `eval` takes: a run, a checkpoint, a release, ONNX files, ARCH,PRETRAINED of open_clip."""
    images: list[str] = Field(min_length=1)
    """Pictures, folders of pictures, or - for paths from standard input, one per line."""
    prompts: str | None = None
    """File with a text per line."""
    text: list[str] = []
    """Texts, instead of a file: text=[a cat, a dog]."""
    classes: str | None = None
    """File with a name per class, for a class head that does not know them."""
    template: str = Field("{c}", pattern=r"\{c\}")
    """Around every text, for instance "a photo of a {c}."."""
    text_from: str | None = None
    """A model whose text tower takes the place of the model's own, or stored texts; as of `eval`."""
    top_k: int = Field(5, gt=0)
    """Texts per picture, best first."""
    logit_scale: float = Field(100, gt=0)
    """What cosines are multiplied with before the softmax; 100 is CLIP's."""
    json_lines: bool = False
    """One JSON object per picture and line instead of text."""
    html: str | None = None
    """File for a page with pictures and bars; null: none."""
    batch_size: int = Field(64, gt=0)
    """Pictures per forward pass."""

    @model_validator(mode="after")
    def _texts(self) -> Self:
        if self.prompts is not None and self.text:
            raise ValueError("give either prompts=FILE or text=[...]: the texts to choose from")
        if self.classes is not None and (self.prompts is not None or self.text):
            raise ValueError("classes names those of a class head: give it without prompts and text")
        return self
