"""The schema of data.cache. Imports no torch."""

from __future__ import annotations

from pydantic import Field

from kd_accel.schema import Schema


class CacheConfig(Schema):
    """Where remote shards (http, https, s3, hf) are kept on this machine while they are read."""

    folder: str = "~/.cache/kd_accel/shards"
    """On a local disk: all processes of the machine share it, and it may be shared by runs."""
    max_gib: float = Field(200.0, gt=0)
    """GiB of tars in it; the least recently used ones go first, never one that is being read."""
    ahead: int = Field(8, ge=0)
    """Shards that are fetched before they are needed, beside those that are being read."""
    downloads: int = Field(4, gt=0)
    """Shards that a training process fetches at a time."""
    tries: int = Field(8, gt=0)
    """Failures in a row, without a new byte, until a shard is given up."""
    stall_seconds: float = Field(60.0, gt=0)
    """Seconds without a byte after which a connection counts as cut."""
