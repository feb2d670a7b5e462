"""Tells a source of remote shards what comes next, while an epoch is read."""

from __future__ import annotations

import numpy as np

from kd_accel.data.remote_shards import shards_by_need
from kd_accel.data.source import Source


class ReadAhead:
    """The shards of one epoch in the order in which this rank needs them; nothing where they lie on a local disk."""

    def __init__(self, source: Source, order: np.ndarray):
        """`order` [batches, rows]: this rank's sample ids of the batches to come."""
        self._source = source
        self._shards = self._last = np.empty(0, dtype=np.int64)
        if source.is_remote:
            starts = np.concatenate([[0], np.cumsum(source.shard_sizes)])
            self._shards, self._last = shards_by_need(order, starts)
        self._told = -1

    def reach(self, batch: int) -> None:
        """Batch `batch` is next: shards whose last batch lies before it are done with."""
        coming = self._shards[self._last >= batch]
        if len(coming) and len(coming) != self._told:
            self._source.prefetch(coming.tolist())
            self._told = len(coming)
