"""The schema of `kd-accel eval prepare`; imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from kd_accel.schema import Schema


class PrepareConfig(Schema):
    """kd-accel eval prepare SOURCE out=FOLDER task=TASK: a HuggingFace dataset as an evaluation set in tars."""

    positional: ClassVar[str] = "source"
    source: str
    """Folder of .parquet files, one written by save_to_disk, or the hf_cache folder of a dataset (.arrow); or such a
    file."""
    out: str
    """Folder of the evaluation set, in CLIP_benchmark's layout."""
    task: Literal["zero_shot", "retrieval", "winogavil"]
    """What the set asks: the class of an image, the captions of an image, or WinoGAViL's associations."""
    split: str = "test"
    """Split of the source."""
    into: Literal["test", "train"] = "test"
    """Split of the evaluation set; train is for linear probes, beside the test that is there."""
    image: str = "image"
    """Column of the images; WinoGAViL's columns have names of their own."""
    label: str = "label"
    """Column of the class indices, for zero_shot."""
    caption: str = "caption"
    """Column of the captions, one or a list of them, for retrieval."""
    class_names: str | None = None
    """File with a class name per line; null takes them from the source."""
    templates: str | None = None
    """File with a prompt per line, {c} for the class name; null is "a photo of a {c}."."""
    samples_per_shard: int = Field(10_000, gt=0)
    """Images of a tar."""
