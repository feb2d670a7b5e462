"""The order of an epoch: a pure function of (seed, epoch), the same for every world size and number of workers."""

from __future__ import annotations

import numpy as np

from kd_accel.schema import ConfigError


def num_batches(num_samples: int, global_batch: int) -> int:
    """Whole global batches in one epoch; raises ConfigError when there is not even one."""
    if num_samples < global_batch:
        raise ConfigError(
            f"data.shards: {num_samples} samples are fewer than one batch of {global_batch} over all processes: "
            "lower data.batch_size (or data.global_batch_size), or add shards"
        )
    return num_samples // global_batch


def epoch_order(shard_sizes: np.ndarray, *, seed: int, epoch: int, window: int, global_batch: int) -> np.ndarray:
    """Sample ids [num_batches, global_batch] int64 of one epoch: no id twice, the incomplete last batch dropped.

    `shard_sizes` [shards] counts the samples of each shard. Shards are permuted, then samples inside each `window` of
    successive shards: reads stay nearly sequential, and a larger window mixes better.
    """
    starts = np.concatenate([[0], np.cumsum(shard_sizes)]).astype(np.int64)
    rows = num_batches(int(starts[-1]), global_batch)
    rng = np.random.default_rng([seed, epoch])
    shards = rng.permutation(len(shard_sizes))
    mixed = []
    for first in range(0, len(shards), window):
        ids = [np.arange(starts[shard], starts[shard + 1]) for shard in shards[first : first + window]]
        mixed.append(rng.permutation(np.concatenate(ids)))
    return np.concatenate(mixed)[: rows * global_batch].reshape(rows, global_batch)
