"""The order of an epoch: pure, without repetition, local to its windows, the same for every world size."""

from __future__ import annotations

import numpy as np
import pytest

from kd_accel.data.order import epoch_order, num_batches
from kd_accel.schema import ConfigError

SIZES = np.array([7, 3, 0, 11, 5, 9])  # N = 35


def order(**changes):
    return epoch_order(SIZES, **{"seed": 3, "epoch": 0, "window": 2, "global_batch": 4, **changes})


def test_the_order_is_a_pure_function_of_seed_and_epoch():
    """The same arguments give the same order, whatever was drawn in between; another seed or epoch gives another."""
    first = order()
    np.random.default_rng(0).random(10)
    order(epoch=1)
    assert (order() == first).all()
    assert not (order(epoch=1) == first).all()
    assert not (order(seed=4) == first).all()


def test_every_id_comes_at_most_once():
    """Whole global batches of distinct ids in range; only the remainder of N / B is left out."""
    ids = order()
    assert ids.shape == (SIZES.sum() // 4, 4)
    assert ids.dtype == np.int64
    assert len(np.unique(ids)) == ids.size
    assert ids.min() >= 0
    assert ids.max() < SIZES.sum()


def test_other_samples_are_left_out_in_another_epoch():
    """The incomplete last batch is not the same in every epoch, so every sample is seen in the long run."""
    seen = np.unique(np.concatenate([order(epoch=epoch).ravel() for epoch in range(10)]))
    assert seen.tolist() == list(range(SIZES.sum()))


@pytest.mark.parametrize("window", [1, 2, 4, 100])
def test_samples_are_mixed_inside_windows_only(window):
    """The order falls into runs, each of which holds all samples of `window` shards and nothing else."""
    shards = epoch_order(np.full(8, 5), seed=0, epoch=0, window=window, global_batch=1).ravel() // 5
    runs = shards.reshape(-1, min(window, 8) * 5)
    assert all(np.unique(run).size == min(window, 8) for run in runs)


def test_a_window_mixes_its_shards():
    """Inside one window the shards do not follow each other one by one."""
    sizes = np.full(2, 100)
    shards = epoch_order(sizes, seed=0, epoch=0, window=2, global_batch=1).ravel() // 100
    assert 50 < (shards[1:] != shards[:-1]).sum() < 150  # one in two on average, one in all without mixing


def test_shards_come_in_another_order_in_every_epoch():
    """With a window of one, the sequence of shards is a permutation that depends on the epoch."""
    sizes = np.full(20, 2)
    first, second = (
        epoch_order(sizes, seed=0, epoch=epoch, window=1, global_batch=1).ravel()[::2] // 2 for epoch in (0, 1)
    )
    assert sorted(first) == sorted(second) == list(range(20))
    assert not (first == second).all()


def test_the_global_batch_only_cuts_the_order():
    """The stream of ids does not depend on the batch, so not on ranks either."""
    long, short = order(global_batch=1).ravel(), order(global_batch=8).ravel()
    assert (long[: len(short)] == short).all()


def test_too_few_samples_are_the_users_mistake():
    """Both numbers and the key; exactly one batch is enough."""
    assert num_batches(35, 35) == 1
    with pytest.raises(ConfigError, match=r"35 samples .* one batch of 36 .* lower data.batch_size"):
        order(global_batch=36)
