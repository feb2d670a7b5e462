"""A config's data as one source: tars, tables, folders, HuggingFace datasets, or several of them."""

from __future__ import annotations

import numpy as np

from kd_accel.config import sources_of
from kd_accel.data.index import expand_shards
from kd_accel.data.shards import TarSource
from kd_accel.data.source import Source, Sources
from kd_accel.sections import DataConfig, SourceConfig


def open_source(data: DataConfig, *, images: bool, captions: bool) -> tuple[Source, np.ndarray | None]:
    """(the samples, passes per epoch of each shard [shards] or None for once each).

    `images`, `captions`: what somebody wants to see; the rest is not read. Raises ConfigError for what cannot be had.
    """
    sections = list(sources_of(data).values())
    opened = [_open(section, images=images, captions=captions) for section in sections]
    if not data.sources:
        return opened[0], None
    weights = [np.full(len(source.shard_sizes), s.weight) for source, s in zip(opened, sections, strict=True)]
    return Sources(opened), np.concatenate(weights)


def _open(section: SourceConfig, *, images: bool, captions: bool) -> Source:
    wanted = {
        "captions": _fields(section.caption, "txt") if captions else [],
        "synthetic": _fields(section.synthetic) if captions else [],
        "label": section.label,
    }
    if section.shards is not None:
        return TarSource(expand_shards(section.shards), image=images, **wanted)
    raise NotImplementedError


def _fields(given: str | list[str] | None, automatic: str | None = None) -> list[str]:
    if given is None:
        return []
    names = [given] if isinstance(given, str) else given
    return [automatic if name == "auto" and automatic else name for name in names]
