"""Samples of indexed tars by id. Tars are untrusted: only the members that the config names are read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kd_accel.data.index import ShardIndex, load_index
from kd_accel.data.members import IMAGE_EXTENSIONS, Field, class_number, texts_of
from kd_accel.data.source import BadSample, Sample, Source
from kd_accel.data.urls import shown

if TYPE_CHECKING:
    from kd_accel.data.remote_shards import RemoteShards

MAX_OPEN = 64  # shards per process; thousands of shards would run into the limit on open files


class TarSource(Source):
    """Samples of the tars `paths`, whose fields are written as in the config; None reads nothing of that kind.

    Opens a tar when a process first reads from it; a remote one is fetched then, if it was not fetched ahead. Raises
    ConfigError as load_index does.
    """

    def __init__(
        self,
        paths: list[Path] | RemoteShards,
        *,
        image: bool = True,
        captions: Sequence[str] = (),
        synthetic: Sequence[str] = (),
        label: str | None = None,
    ):
        self._remote = None if isinstance(paths, list) else paths
        self.is_remote = self._remote is not None
        self.paths: list[Path] = paths if isinstance(paths, list) else paths.paths
        self._image, self._label = image, label
        self._captions, self._synthetic = [Field.parse(c) for c in captions], [Field.parse(c) for c in synthetic]
        members: list[tuple[str, tuple[str, ...]]] = [("data.shards", IMAGE_EXTENSIONS)] if image else []
        members += [("data.caption", (field.extension,)) for field in self._captions]
        members += [("data.synthetic", (field.extension,)) for field in self._synthetic]
        members += [("data.label", (label,))] if label is not None else []
        self.index: ShardIndex = load_index(self.paths, members)
        self.num_samples, self.shard_sizes = self.index.num_samples, self.index.shard_sizes
        self._max_open = self._max_coming = MAX_OPEN
        self._files: dict[int, int] = {}  # shard -> file descriptor, least recently used first

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}}  # descriptors mean nothing in another process

    def read(self, sample_id: int) -> Sample:
        """The sample; raises BadSample for a member that is absent, cut, or not what it should be."""
        column = int(self._image)
        image = self._member(sample_id, 0, "image") if self._image else None
        captions = self._texts(sample_id, self._captions, column, "caption")
        column += len(self._captions)
        synthetic = self._texts(sample_id, self._synthetic, column, "synthetic caption")
        label = None
        if self._label is not None:
            member = self._member(sample_id, column + len(self._synthetic), "label")
            label = class_number(member.decode("ascii", "replace"))
        return Sample(sample_id, self.key(sample_id), image, captions, label, synthetic)

    def key(self, sample_id: int) -> str:
        """The sample's name in its tar."""
        name: bytes = self.index.keys[sample_id]
        return name.decode("utf-8", "backslashreplace")

    def shard(self, sample_id: int) -> str:
        """The tar that holds the sample."""
        shard = self._shard(sample_id)
        return str(self.paths[shard]) if self._remote is None else shown(self._remote.urls[shard])

    def read_in_windows(self, window: int, ahead: int) -> None:
        """Hold `window` remote shards at most, since what is open stays in the cache, and fetch `ahead` more than that.

        Raises ConfigError when the cache cannot hold them, with another window of processes that are a step further.
        """
        assert self._remote is not None, "tars on a local disk are all at hand"
        self._max_open, self._max_coming = min(MAX_OPEN, window), window + ahead
        self._remote.require_room(min(len(self.paths), 2 * window + ahead))

    def prefetch(self, shards: Sequence[int]) -> None:
        """Fetch these remote shards in the background, soonest first."""
        if self._remote is not None:
            self._remote.prefetch(shards[: self._max_coming])

    def _texts(self, sample_id: int, fields: list[Field], column: int, name: str) -> tuple[str, ...]:
        """What the fields that the sample has say, at least one text; () where there are no fields."""
        has = [i for i, _ in enumerate(fields) if self.index.offsets[sample_id, column + i] >= 0]
        return texts_of([(fields[i], self._member(sample_id, column + i, name)) for i in has], name) if fields else ()

    def _shard(self, sample_id: int) -> int:
        return int(np.searchsorted(self.index.starts, sample_id, side="right")) - 1

    def _member(self, sample_id: int, column: int, name: str) -> bytes:
        offset, size = int(self.index.offsets[sample_id, column]), int(self.index.sizes[sample_id, column])
        if offset < 0:
            raise BadSample(f"{name} member is missing")
        data = os.pread(self._file(self._shard(sample_id)), size, offset)
        if len(data) < size:
            raise BadSample(f"short read: {len(data)} of {size} bytes of the {name}")
        return data

    def _file(self, shard: int) -> int:
        if shard in self._files:
            self._files[shard] = self._files.pop(shard)  # now the most recently used
        else:
            if len(self._files) == self._max_open:
                os.close(self._files.pop(next(iter(self._files))))
            path = self.paths[shard]
            self._files[shard] = os.open(path, os.O_RDONLY) if self._remote is None else self._remote.open(shard)
        return self._files[shard]
