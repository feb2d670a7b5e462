"""Tells a source of remote shards what comes next, while an epoch is read."""

from __future__ import annotations

import numpy as np

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


def shards_by_need(order: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(shards in the order in which they are first read, the last batch that reads each one) of an epoch.

    `order` [batches, B] sample ids, `starts` [shards + 1] the first id of each shard, then N. Those whose last batch is
    still to come are what to prefetch, as far ahead as there is room.
    """
    shard_of = np.searchsorted(starts, order.ravel(), side="right") - 1
    rows = np.arange(len(shard_of))
    first, last = np.full(len(starts) - 1, len(rows)), np.full(len(starts) - 1, -1)
    last[shard_of] = rows  # of several values the last one stays
    first[shard_of[::-1]] = rows[::-1]
    shards = np.argsort(first, kind="stable")[: np.count_nonzero(last >= 0)]
    return shards, last[shards] // order.shape[1]
