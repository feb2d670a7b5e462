"""What every kind of data comes down to: samples by id, wherever they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np


class BadSample(Exception):
    """A sample that cannot be used; `reason` says why, for bad_samples.jsonl."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Sample:
    """One sample as it lies in its file; what was not asked for is None or empty."""

    id: int
    key: str  # its name, for people and for what is stored of it
    image: bytes | None = None  # encoded
    captions: tuple[str, ...] = ()  # stripped, none empty
    label: int | None = None  # class number
    synthetic: tuple[str, ...] = ()  # captions that a model wrote


class Source(Protocol):
    """Samples by id, 0 <= id < num_samples. Picklable; a process opens its files when it first reads."""

    num_samples: int
    shard_sizes: np.ndarray  # [shards] int64: runs of neighbouring ids that are cheap to read together

    def read(self, sample_id: int) -> Sample:
        """The sample; raises BadSample for one that cannot be used."""

    def key(self, sample_id: int) -> str:
        """The sample's name."""

    def shard(self, sample_id: int) -> str:
        """The file that holds it."""

    is_remote: bool = False  # whether prefetch() makes a difference
    class_names: tuple[str, ...] | None = None  # what it calls the classes that labels number, where it knows

    def prefetch(self, shards: Sequence[int]) -> None:
        """Shards that are read next, soonest first: a hint."""
        return None


class Sources(Source):
    """Several sources one after the other, as one."""

    def __init__(self, sources: Sequence[Source]):
        self.sources = list(sources)
        self._starts = np.cumsum([0, *(source.num_samples for source in self.sources)])  # id of each one's first sample
        self.num_samples = int(self._starts[-1])
        self.shard_sizes = np.concatenate([source.shard_sizes for source in self.sources])
        self.is_remote = any(source.is_remote for source in self.sources)
        names = {source.class_names for source in self.sources}
        self.class_names = names.pop() if len(names) == 1 else None
        self._first_shards = np.cumsum([0, *(len(source.shard_sizes) for source in self.sources)])

    def read(self, sample_id: int) -> Sample:
        source, inside = self._find(sample_id)
        return replace(source.read(inside), id=sample_id)

    def key(self, sample_id: int) -> str:
        source, inside = self._find(sample_id)
        return source.key(inside)

    def shard(self, sample_id: int) -> str:
        source, inside = self._find(sample_id)
        return source.shard(inside)

    def prefetch(self, shards: Sequence[int]) -> None:
        numbers = np.asarray(shards, dtype=np.int64)
        owners = np.searchsorted(self._first_shards, numbers, side="right") - 1
        for number, source in enumerate(self.sources):
            source.prefetch((numbers[owners == number] - self._first_shards[number]).tolist())

    def _find(self, sample_id: int) -> tuple[Source, int]:
        number = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        return self.sources[number], sample_id - int(self._starts[number])
