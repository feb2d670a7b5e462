"""Training batches of a stream: TrainLoader's outside, an order that depends on the number of processes and workers.

Every worker of every rank has its own shards and goes through them without end, so ranks never wait for each other's
last sample; an epoch is data.num_samples samples, whoever brought them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from kd_accel.data.batches import BatchMaker, steps_of
from kd_accel.data.order import num_batches
from kd_accel.data.source import BadSample, Sample
from kd_accel.data.stream import TarStream, Unusable
from kd_accel.data.workers import items_of
from kd_accel.schema import ConfigError, LocalError
from kd_accel.types import Batch

log = logging.getLogger("kd_accel")

MAX_BAD = 1000  # in a row, until the data counts as unusable


class StreamLoader:
    """Iterates over steps without end, from the loaded state on. A step is a list of this rank's micro-batches."""

    batch_size: int  # b, rows of a micro-batch
    accumulate: int  # micro-batches of a step
    global_batch: int  # rows of all ranks and micro-batches
    num_samples: None = None  # ids are hashes: terms that remember by sample id cannot be used
    class_names: None = None
    samples_per_epoch: int  # as the config says
    steps_per_epoch: int  # whole global batches

    epoch: int  # of the next batch
    batches_done: int  # yielded in this epoch
    bad_samples: list[dict[str, Any]]  # records since the last take_bad()

    def __init__(
        self,
        stream: TarStream,
        maker: BatchMaker,
        *,
        samples_per_epoch: int,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        num_workers: int,
        accumulate: int = 1,
    ):
        """Raises ConfigError for fewer shards than loader processes, and less than a batch per epoch."""
        readers = world_size * max(num_workers, 1)
        if len(stream.urls) < readers:
            raise ConfigError(
                f"data.shards: {len(stream.urls)} shards are fewer than the {readers} processes that read them "
                f"({world_size} ranks x data.num_workers={num_workers}): lower data.num_workers or cut smaller shards"
            )
        self.batch_size, self.accumulate = batch_size, accumulate
        self.global_batch = batch_size * accumulate * world_size
        self.samples_per_epoch = samples_per_epoch
        self.steps_per_epoch = num_batches(samples_per_epoch, self.global_batch)
        self.epoch, self.batches_done, self.bad_samples = 0, 0, []
        self._stream, self._maker, self._seed = stream, maker, seed
        self._rank, self._world_size, self._num_workers = rank, world_size, num_workers

    def __iter__(self) -> Iterator[list[Batch]]:
        shards_done = self._shards_done()
        stream = _Stream(self._stream, self._maker, self.batch_size, self._rank, self._world_size, shards_done)
        with closing(items_of(stream, num_workers=self._num_workers)) as items:
            for micro_batches, bad in steps_of(items, self._maker.batch, self.accumulate):
                self.bad_samples += bad
                self._count_batch()
                yield micro_batches

    def _count_batch(self) -> None:
        done = self.batches_done + 1
        self.epoch, self.batches_done = self.epoch + done // self.steps_per_epoch, done % self.steps_per_epoch

    def take_bad(self) -> list[dict[str, Any]]:
        """{id, key, shard, reason, replaced_by, epoch} of what was left out in the batches since the last call."""
        taken, self.bad_samples = self.bad_samples, []
        return taken

    def state_dict(self) -> dict[str, int]:
        """How far it has come; the same on every rank."""
        counted = {"seed": self._seed, "global_batch": self.global_batch, "samples_per_epoch": self.samples_per_epoch}
        return {"epoch": self.epoch, "batches_done": self.batches_done, **counted}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind the shards that are done; call it before `iter`."""
        steps_before = state["epoch"] * (state["samples_per_epoch"] // state["global_batch"]) + state["batches_done"]
        steps = steps_before * state["global_batch"] // self.global_batch
        self.epoch, self.batches_done = divmod(steps, self.steps_per_epoch)
        log.warning(
            "data.loader=stream: this resume is approximate: every loader process goes on at the shard that it was in, "
            "after %d shards; up to a shard per process (of about %d samples) and the shuffle buffer are seen twice or "
            "not at all",
            self._shards_done(),
            self.samples_per_epoch // len(self._stream.urls),
        )

    def _shards_done(self) -> int:
        """Whole shards behind each loader process, as if all shards were of one size."""
        samples = (self.epoch * self.steps_per_epoch + self.batches_done) * self.global_batch
        readers = self._world_size * max(self._num_workers, 1)
        return samples * len(self._stream.urls) // (self.samples_per_epoch * readers)


class _Stream(IterableDataset):
    """(joined rows, bad records) of this worker's shards, in the workers."""

    def __init__(
        self, stream: TarStream, maker: BatchMaker, batch_size: int, rank: int, world_size: int, shards_done: int
    ):
        self._stream, self._maker, self._batch_size = stream, maker, batch_size
        self._rank, self._world_size, self._shards_done = rank, world_size, shards_done

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        parts = self._world_size * workers
        try:
            yield from self._batches(self._stream.samples(self._rank * workers + number, parts, self._shards_done))
        except ConfigError as error:
            yield error  # raised by StreamLoader: torch would bury its one line in the worker's traceback

    def _batches(self, samples: Iterator[tuple[int, Sample | Unusable]]) -> Iterator[Any]:
        rows: list[Any] = []
        bad: list[dict[str, Any]] = []
        in_a_row = 0
        for epoch, found in samples:
            try:
                rows.append(self._row(found, epoch))
                in_a_row = 0
            except BadSample as error:
                bad.append(_record(found, error.reason, epoch))
                if (in_a_row := in_a_row + 1) == MAX_BAD:
                    last = bad[-1]
                    raise LocalError(
                        f"data.shards: no usable sample in {MAX_BAD} in a row, the last {last['key']} in "
                        f"{last['shard']}: {last['reason']}"
                    ) from None
            if len(rows) == self._batch_size:
                yield self._maker.join(rows), bad
                rows, bad = [], []

    def _row(self, found: Sample | Unusable, epoch: int) -> Any:
        if isinstance(found, Unusable):
            raise BadSample(found.reason)
        return self._maker.row(found, epoch)


def _record(found: Sample | Unusable, reason: str, epoch: int) -> dict[str, Any]:
    """As TrainLoader's, but nothing replaces what is left out of a stream: the next sample is taken."""
    shard = found.shard if isinstance(found, Unusable) else None
    return {"id": None, "key": found.key, "shard": shard, "reason": reason, "replaced_by": None, "epoch": epoch}
