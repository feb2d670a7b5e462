"""Training batches in one exact order, for any number of workers and ranks.

A step is one global batch of order.py. Rank r takes its r-th part, in `accumulate` micro-batches of b rows. What has
been yielded, not what the workers have prefetched, is the state, so a run goes on at exactly the next step. T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from kd_accel.data.batches import BatchMaker, Joined, Row, steps_of
from kd_accel.data.embeddings import EmbeddingStore
from kd_accel.data.open import open_source
from kd_accel.data.order import epoch_order, num_batches, samples_per_epoch
from kd_accel.data.read_ahead import ReadAhead
from kd_accel.data.source import BadSample, Source
from kd_accel.data.workers import items_of
from kd_accel.data_config import DataConfig
from kd_accel.schema import ConfigError, LocalError
from kd_accel.types import Batch, InputContract

MAX_TRIES = 100  # samples in a row, from a bad one on, until the data counts as unusable


class TrainLoader:
    """Iterates over steps without end, from the loaded state on; `iter` again goes on after the last yielded step.

    A step is a list of the micro-batches of this rank.

    Raises ConfigError for unusable data, too few samples, and a global batch that cannot be dealt evenly.
    """

    batch_size: int  # b, rows of a micro-batch
    accumulate: int  # micro-batches of a step
    global_batch: int  # rows of all ranks and micro-batches
    num_samples: int  # N
    steps_per_epoch: int  # whole global batches

    epoch: int  # of the next batch
    batches_done: int  # yielded in this epoch, 0 <= batches_done < steps_per_epoch
    bad_samples: list[dict[str, Any]]  # records of yielded batches since the last take_bad()

    def __init__(
        self,
        config: DataConfig,
        *,
        contracts: dict[str, InputContract],
        seed: int,
        rank: int,
        world_size: int,
        accumulate: int = 1,
        stores: dict[str, EmbeddingStore] | None = None,
    ):
        """`contracts`: what each model wants to see; `stores`: where features of teachers lie, by teacher."""
        self._maker = BatchMaker(config, contracts, seed=seed, stores=stores)
        wanted = {"images": self._maker.reads_images, "captions": self._maker.reads_captions}
        source, passes = open_source(config, **wanted)
        for store in (stores or {}).values():
            store.attach(source, config)
        self.batch_size = rows_per_micro_batch(config, world_size, accumulate)
        self.accumulate = accumulate
        self.global_batch = self.batch_size * accumulate * world_size
        self.num_samples, self.class_names = source.num_samples, source.class_names
        self.steps_per_epoch = num_batches(samples_per_epoch(source.shard_sizes, passes), self.global_batch)
        self.epoch, self.batches_done, self.bad_samples = 0, 0, []
        self._config, self._seed, self._rank = config, seed, rank
        self._shard_sizes, self._passes = source.shard_sizes, passes
        self._source, self._rows = source, _Rows(source, self._maker)

    def __iter__(self) -> Iterator[list[Batch]]:
        """One set of workers serves all epochs: forking them anew would stall the devices at every epoch's start.

        A worker uses one thread: torch sees to its own, open_clip (on import) to the tokenizers'.
        """
        schedule = self._schedule(self.epoch, self.batches_done)
        with closing(items_of(self._rows, num_workers=self._config.num_workers, sampler=schedule)) as items:
            for micro_batches, bad in steps_of(items, self._maker.batch, self.accumulate):
                self.bad_samples += bad
                self._count_batch()
                yield micro_batches

    def take_bad(self) -> list[dict[str, Any]]:
        """{id, key, shard, reason, replaced_by, epoch} of each sample replaced in the batches since the last call."""
        taken, self.bad_samples = self.bad_samples, []
        return taken

    def state_dict(self) -> dict[str, int]:
        """The next batch's place, and what the order was dealt from."""
        return {"epoch": self.epoch, "batches_done": self.batches_done, **self._dealt_from()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at the next batch; call it before `iter`. Raises ConfigError when the order is no longer the same."""
        keys = {
            "seed": "seed",
            "shuffle_window": "data.shuffle_window",
            "global_batch": "data.global_batch_size",
            "num_samples": "data",
            "samples_per_epoch": "data.sources",
        }
        for name, now in self._dealt_from().items():
            if state[name] != now:
                raise ConfigError(
                    f"{keys[name]}: the checkpoint's order was dealt with {name}={state[name]}, this run has "
                    f"{name}={now}: an exact resume needs the same {name}"
                )
        self.epoch, self.batches_done = state["epoch"], state["batches_done"]

    def _dealt_from(self) -> dict[str, int]:
        return {
            "seed": self._seed,
            "shuffle_window": self._config.shuffle_window,
            "global_batch": self.global_batch,
            "num_samples": self.num_samples,
            "samples_per_epoch": samples_per_epoch(self._shard_sizes, self._passes),
        }

    def _count_batch(self) -> None:
        done = self.batches_done + 1
        self.epoch, self.batches_done = self.epoch + done // self.steps_per_epoch, done % self.steps_per_epoch

    def _schedule(self, epoch: int, batches_done: int) -> Iterator[tuple[int, np.ndarray]]:
        """(epoch, ids [b]) of every micro-batch of this rank from the given place on, without end."""
        rows = self.batch_size * self.accumulate
        mine = slice(self._rank * rows, (self._rank + 1) * rows)
        window = self._config.shuffle_window
        while True:
            order = epoch_order(
                self._shard_sizes,
                seed=self._seed,
                epoch=epoch,
                window=window,
                global_batch=self.global_batch,
                passes=self._passes,
            )[batches_done:, mine]
            ahead = ReadAhead(self._source, order)
            for number, ids in enumerate(order.reshape(-1, self.batch_size)):
                ahead.reach(number // self.accumulate)
                yield epoch, ids
            epoch, batches_done = epoch + 1, 0


class _Rows(Dataset):
    """(epoch, ids [b]) -> (rows on their way, records of bad samples), in the workers."""

    def __init__(self, source: Source, maker: BatchMaker):
        self._source, self._maker = source, maker

    def __getitem__(self, item: tuple[int, np.ndarray]) -> tuple[Joined, list[dict]] | ConfigError:
        epoch, ids = item
        try:
            rows, bad = zip(*(self._usable(int(i), epoch) for i in ids), strict=True)
            return self._maker.join(list(rows)), [record for record in bad if record is not None]
        except ConfigError as error:
            return error  # raised by TrainLoader: torch would bury its one line in the worker's traceback

    def _usable(self, sample_id: int, epoch: int) -> tuple[Row, dict | None]:
        """The sample, or the next usable one and the record of the replacement: the same on every rank and worker."""
        total = self._source.num_samples
        reasons = []
        for tried in range(min(MAX_TRIES, total)):
            try:
                row = self._maker.row(self._source.read((sample_id + tried) % total), epoch)
            except BadSample as bad:
                reasons.append(bad.reason)
                continue
            return row, self._record(sample_id, reasons[0], row.id, epoch) if reasons else None
        where = f"{self._source.key(sample_id)} in {self._source.shard(sample_id)}"
        raise LocalError(f"data: no usable sample in {len(reasons)} in a row from {where} on: {reasons[0]}")

    def _record(self, sample_id: int, reason: str, replaced_by: int, epoch: int) -> dict[str, Any]:
        place = {"id": sample_id, "key": self._source.key(sample_id), "shard": self._source.shard(sample_id)}
        return {**place, "reason": reason, "replaced_by": replaced_by, "epoch": epoch}


def rows_per_micro_batch(config: DataConfig, world_size: int, accumulate: int) -> int:
    """What one forward pass of one process sees. Raises ConfigError for a global batch that is not dealt evenly."""
    if config.batch_size is not None:
        return config.batch_size
    assert config.global_batch_size is not None, "a config gives one of them"
    parts = world_size * accumulate
    if config.global_batch_size % parts:
        micro_batches = f" of {accumulate} micro-batches (train.accumulate)" if accumulate > 1 else ""
        raise ConfigError(
            f"data.global_batch_size={config.global_batch_size} cannot be dealt evenly to {world_size}"
            f" processes{micro_batches}: choose a multiple of {parts}"
        )
    return config.global_batch_size // parts
