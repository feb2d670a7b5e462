"""The schema of `kd-accel pack`; imports no torch."""

from __future__ import annotations

from pydantic import Field

from kd_accel.data_config import SourceConfig


class PackConfig(SourceConfig):
    """kd-accel pack table=FILE out=FOLDER: any source as indexed webdataset shards.

    A sample is KEY.jpg (png, webp), KEY.txt and, where there are several captions, KEY.json with all of them."""

    out: str
    """Folder of the shards; one that was begun with the same settings is finished."""
    samples_per_shard: int = Field(10_000, gt=0)
    """Samples of a shard, of which the unusable ones are left out."""
    short_side: int | None = Field(None, gt=0)
    """Pictures whose shorter side has more pixels are resized to it, for instance 288; null: all keep their bytes."""
    quality: int = Field(90, ge=1, le=100)
    """JPEG quality of resized pictures."""
    num_workers: int = Field(2, ge=0)
    """Processes, of which each writes a shard at a time; 0 writes in the process itself."""
