"""Reads one sample of an indexed tar by its id. Tars are untrusted: only its image, caption and label are read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kd_accel.data.index import ShardIndex

MAX_LABEL_DIGITS = 18  # what surely fits into int64
MAX_OPEN = 64  # shards per process; thousands of shards would run into the limit on open files


class BadSample(Exception):
    """A sample that cannot be used; `reason` says why, for bad_samples.jsonl."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Sample:
    """One sample as it lies in its tar."""

    id: int
    key: str
    image: bytes  # encoded
    caption: str  # stripped, never empty
    label: int | None  # class number, where the index knows labels


class ShardReader:
    """Samples by id from the tars `paths`, which `index` describes. Opens a tar when a process first reads from it."""

    def __init__(self, paths: list[Path], index: ShardIndex):
        assert len(paths) == len(index.shard_sizes)
        self.paths = paths
        self.index = index
        self._files: dict[int, int] = {}  # shard -> file descriptor, least recently used first

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}}  # descriptors mean nothing in another process

    def read(self, sample_id: int) -> Sample:
        """The sample; raises BadSample for a member that is absent, cut, or not what it should be."""
        image, caption = self._member(sample_id, 0, "image"), self._member(sample_id, 1, "caption")
        try:
            text = caption.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise BadSample("caption is not UTF-8") from None
        if not text:
            raise BadSample("caption is empty")
        label = self._label(sample_id) if self.index.offsets.shape[1] > 2 else None
        return Sample(sample_id, self.key(sample_id), image, text, label)

    def _label(self, sample_id: int) -> int:
        text = self._member(sample_id, 2, "label").decode("ascii", "replace").strip()
        if not text.isdecimal() or len(text) > MAX_LABEL_DIGITS:
            raise BadSample(f"label is not a whole number: {text[:20]!r}")
        return int(text)

    def key(self, sample_id: int) -> str:
        """The sample's name in its tar."""
        return self.index.keys[sample_id].decode("utf-8", "backslashreplace")

    def shard(self, sample_id: int) -> Path:
        """The tar that holds the sample."""
        return self.paths[self._shard(sample_id)]

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
            if len(self._files) == MAX_OPEN:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(self.paths[shard], os.O_RDONLY)
        return self._files[shard]
