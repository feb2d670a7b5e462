"""The keys of `kd-accel index`. Imports no torch."""

from __future__ import annotations

from typing import ClassVar

from kd_accel.cache_config import CacheConfig
from kd_accel.schema import Schema


class IndexConfig(Schema):
    """kd-accel index SHARDS: write NNNNN.idx.npz beside every tar, and manifest.json."""

    positional: ClassVar[str] = "shards"
    shards: str | list[str]
    """Folder of tars, or tars with brace ranges; remote ones are read once, and their index stays in the cache."""
    cache: CacheConfig = CacheConfig()
