"""The order of an epoch: a pure function of (seed, epoch), the same for every world size and number of workers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from kd_accel.schema import ConfigError


def samples_per_epoch(shard_sizes: np.ndarray, passes: np.ndarray | None = None) -> int:
    """Samples that an epoch shows, a sample as often as its shard's `passes` [shards] say; None: each once."""
    if passes is None:
        return int(shard_sizes.sum())
    return int(sum(round(float(p * shard_sizes[passes == p].sum())) for p in np.unique(passes)))


def num_batches(num_samples: int, global_batch: int) -> int:
    """Whole global batches in one epoch; raises ConfigError when there is not even one."""
    if num_samples < global_batch:
        raise ConfigError(
            f"data.shards: {num_samples} samples are fewer than one batch of {global_batch} over all processes: "
            "lower data.batch_size (or data.global_batch_size), or add shards"
        )
    return num_samples // global_batch


def epoch_order(
    shard_sizes: np.ndarray,
    *,
    seed: int,
    epoch: int,
    window: int,
    global_batch: int,
    passes: np.ndarray | None = None,
) -> np.ndarray:
    """Sample ids [num_batches, global_batch] int64 of one epoch, the incomplete last batch dropped.

    `shard_sizes` [shards] counts the samples of each shard. Shards are permuted, then samples inside each `window` of
    successive shards: reads stay nearly sequential, and a larger window mixes better. No id comes twice, unless
    `passes` [shards] says how often a shard's samples are shown: 2 has its shard twice, 0.5 half of its samples.
    """
    rows = num_batches(samples_per_epoch(shard_sizes, passes), global_batch)
    rng = np.random.default_rng([seed, epoch])
    runs = _runs(shard_sizes, passes, rng)
    order = rng.permutation(len(runs))
    mixed = []
    for first in range(0, len(order), window):
        mixed.append(rng.permutation(np.concatenate([runs[run] for run in order[first : first + window]])))
    return np.concatenate(mixed)[: rows * global_batch].reshape(rows, global_batch)


def _runs(shard_sizes: np.ndarray, passes: np.ndarray | None, rng: np.random.Generator) -> list[np.ndarray]:
    """Ids of each shard, as often as its passes say; of a last, partial pass a random share of the ids."""
    starts = np.concatenate([[0], np.cumsum(shard_sizes)]).astype(np.int64)
    whole = [np.arange(start, end) for start, end in pairwise(starts)]
    if passes is None:
        return whole
    runs = []
    for share in np.unique(passes):  # shards of one weight share one draw: their sum, not each, is rounded
        mine = [whole[shard] for shard in np.flatnonzero(passes == share)]
        times, ids = int(share), np.concatenate(mine)
        runs += mine * times
        drawn = np.sort(rng.permutation(ids)[: round(float(share * len(ids))) - times * len(ids)])
        runs += [part for part in np.split(drawn, np.searchsorted(drawn, [run[0] for run in mine[1:]])) if len(part)]
    return runs
