"""A config's data as one source: tars, tables, folders, HuggingFace datasets, or several of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kd_accel.cache_config import CacheConfig
from kd_accel.config import sources_of
from kd_accel.data.folders import existing_folder, open_folder
from kd_accel.data.index import expand_shards
from kd_accel.data.shards import TarSource
from kd_accel.data.source import Source, Sources
from kd_accel.data.tables import expand_files, open_table
from kd_accel.data.urls import is_remote
from kd_accel.data_config import DataConfig, SourceConfig
from kd_accel.schema import ConfigError

if TYPE_CHECKING:
    from kd_accel.data.remote_shards import RemoteShards


def open_source(data: DataConfig, *, images: bool, captions: bool) -> tuple[Source, np.ndarray | None]:
    """(the samples, passes per epoch of each shard [shards] or None for once each).

    `images`, `captions`: what somebody wants to see; the rest is not read, and no sample has another id or key for it.
    Raises ConfigError for what cannot be had.
    """
    sections = list(sources_of(data).values())
    opened = [open_one(section, images=images, captions=captions) for section in sections]
    for source, section in zip(opened, sections, strict=True):
        if isinstance(source, TarSource) and source.is_remote:
            source.read_in_windows(data.shuffle_window, section.cache.ahead)
    if not data.sources:
        return opened[0], None
    mixed = zip(opened, data.sources.values(), strict=True)
    weights = [np.full(len(source.shard_sizes), section.weight) for source, section in mixed]
    return Sources(opened), np.concatenate(weights)


def check_there(data: DataConfig) -> None:
    """Raises ConfigError for a local file or folder that is not there, before anything slow is done for it."""
    for section in sources_of(data).values():
        if section.folder is not None:
            existing_folder(section.folder)
        elif section.table is not None:
            expand_files(section.table)
        elif section.shards is not None and data.loader == "indexed":
            entries = [section.shards] if isinstance(section.shards, str) else section.shards
            if not any(map(is_remote, entries)):
                expand_shards(entries)


def open_one(section: SourceConfig, *, images: bool, captions: bool) -> Source:
    """The samples of one source; arguments and errors as of open_source."""
    if section.shards is not None:
        return _open_tars(section, images=images, captions=captions)
    caption = section.caption if captions else None
    if section.folder is not None:
        labels = section.label is not None
        return open_folder(
            section.folder, caption=caption, labels=labels, max_samples=section.max_samples, images=images
        )
    columns: dict[str, Any] = {
        "caption": caption,
        "synthetic": section.synthetic if captions else None,
        "label": section.label,
        "max_samples": section.max_samples,
    }
    if section.table is not None:
        root = section.image_root
        return open_table(section.table, image=section.image, image_root=root, images=images, **columns)
    from kd_accel.data.huggingface import open_dataset  # `datasets` takes long to import

    assert section.dataset is not None, "a source is one of them"
    return open_dataset(section.dataset, split=section.split, image=section.image if images else None, **columns)


def _open_tars(section: SourceConfig, *, images: bool, captions: bool) -> Source:
    assert section.shards is not None
    if section.max_samples is not None:
        raise ConfigError("data.max_samples: tars are read whole; name fewer of them in data.shards")
    return TarSource(_tars(section.shards, section.cache), **tar_fields(section, images=images, captions=captions))


def tar_fields(section: SourceConfig, *, images: bool, captions: bool) -> dict[str, Any]:
    """What of its members a source or stream of tars is to read."""
    return {
        "image": images,
        "captions": _fields(section.caption, "txt") if captions else [],
        "synthetic": _fields(section.synthetic) if captions else [],
        "label": section.label,
    }


def _tars(shards: str | list[str], config: CacheConfig) -> list[Path] | RemoteShards:
    if not any(map(is_remote, [shards] if isinstance(shards, str) else shards)):
        return expand_shards(shards)
    from kd_accel.data.cache import open_cache  # these bring aiohttp, a fifth of a second that others need not wait
    from kd_accel.data.remote_index import expand_urls
    from kd_accel.data.remote_shards import RemoteShards

    cache = open_cache(config)
    return RemoteShards(expand_urls(shards, cache), cache, downloads=config.downloads)


def _fields(given: str | list[str] | None, automatic: str | None = None) -> list[str]:
    if given is None:
        return []
    names = [given] if isinstance(given, str) else given
    return [automatic if name == "auto" and automatic else name for name in names]
