"""kd-accel index SHARDS: list the samples of webdataset tars, so that any sample is one read away (data/index.py)."""

from __future__ import annotations

from kd_accel.data.cache import open_cache
from kd_accel.data.index import build_index, expand_shards
from kd_accel.data.remote_index import index_remote
from kd_accel.data.urls import is_remote
from kd_accel.index_config import IndexConfig


def run(config: IndexConfig) -> None:
    """Index `config.shards` and say what there is."""
    entries = [config.shards] if isinstance(config.shards, str) else config.shards
    if any(map(is_remote, entries)):
        written, total, samples = index_remote(config.shards, open_cache(config.cache))
    else:
        paths = expand_shards(config.shards)
        written, samples = build_index(paths, progress=True)
        total = len(paths)
    print(f"{samples:,} samples in {total:,} shards: {written:,} indexed now, {total - written:,} already were.")
