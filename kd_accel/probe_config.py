"""The schema of eval's section `probe`. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from kd_accel.schema import Schema


class ProbeConfig(Schema):
    """How a linear classifier is trained on a model's image features of a set's training split.

    It needs no text tower and no class names. The test split decides nothing."""

    shots: int | None = Field(None, gt=0)
    """Training images of each class, drawn by `seed` alike for every model; null takes all."""
    val_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of each class's training images on which C is chosen, before the last fit on all of them."""
    seed: int = Field(0, ge=0)
    """Draws the shots, and the images on which C is chosen."""
    c: list[Annotated[float, Field(gt=0)]] | None = Field(None, min_length=1)
    """Values of C, the inverse weight of the L2 penalty, to choose from; null searches 10^-6 to 10^6 as CLIP did."""
    max_iter: int = Field(1000, gt=0)
    """Iterations of L-BFGS after which a fit counts as done."""

    @model_validator(mode="after")
    def _one_shot_has_no_choice(self) -> Self:
        if self.shots == 1 and (self.c is None or len(self.c) > 1):
            raise ValueError("shots=1 leaves no training image to choose C on: give one value, for instance c=[0.316]")
        return self
