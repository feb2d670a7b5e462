"""When a checkpoint is written, and that a failure to write one costs nothing but that one."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from kd_accel import distributed
from kd_accel.checkpoint import TrainState, drop_partial, folder_for, newest, publish, write
from kd_accel.config import TrainConfig
from kd_accel.engine import Engine
from kd_accel.held import HostMemory
from kd_accel.objective import Objective
from kd_accel.schema import ConfigError
from kd_accel.snapshot import Taken, joined, take_snapshot

log = logging.getLogger("kd_accel")


class Saver:
    """Writes checkpoints of one run, in the foreground or behind the training's back; at most one at a time.

    `save` and `finish` are collective; what is written is collected in the background by a process group of its own.
    """

    def __init__(
        self,
        run: Path,
        config: TrainConfig,
        *,
        steps_per_epoch: int,
        total_steps: int,
        published: Callable[[Path], None],
        newest_step: int | None = None,
    ):
        """`published`, on the main rank, is told every whole checkpoint.

        `newest_step`: of the checkpoint that it goes on from, where that is of this run.
        """
        self._published = published
        self._run, self._config, self._total_steps = run, config, total_steps
        steps, epochs, minutes = config.save.every_steps, config.save.every_epochs, config.save.every_minutes
        if not (steps or epochs or minutes):
            epochs = 1
        self._steps_between = [length for length in (steps, epochs and epochs * steps_per_epoch) if length]
        self._seconds = None if minutes is None else 60 * minutes
        self._last_time = time.monotonic()
        self._snapshot_step: int | None = None  # of the checkpoint under way
        self._newest_step: int | None = newest_step  # of the last one that was begun and did not fail
        self._last: Path | None = None  # the last one that this process has seen whole
        self._memory, self._group = HostMemory(), distributed.second_group()
        self._thread: threading.Thread | None = None
        self._result: tuple[dict[str, list], str | None] = {}, None  # files written by this rank, what went wrong
        if distributed.is_main():
            drop_partial(run)

    def is_due(self, step: int) -> bool:
        """By the number of steps; alike on every rank."""
        return step == self._total_steps or any(step % between == 0 for between in self._steps_between)

    def time_is_up(self) -> bool:
        """By the clock of this process: ranks may differ."""
        return self._seconds is not None and time.monotonic() - self._last_time >= self._seconds

    def is_writing(self) -> bool:
        """Whether this rank's files of the checkpoint under way are still to come."""
        return self._thread is not None and self._thread.is_alive()

    def is_under_way(self) -> bool:
        """Whether a checkpoint has been begun that `finish` has not seen; alike on every rank."""
        return self._snapshot_step is not None

    def has(self, step: int) -> bool:
        """Whether there is a checkpoint of this step, or one under way; alike on every rank."""
        return step == self._newest_step

    def save(self, *, engine: Engine, objective: Objective, state: TrainState, at_end: bool) -> None:
        """Take a snapshot and write it: now when it is the run's last or save.background=false, else beside training.

        Raises ConfigError when the last one cannot be written.
        """
        if self.is_under_way():
            self.finish()
        self._last_time = time.monotonic()
        taken = take_snapshot(engine=engine, objective=objective, state=state, config=self._config, memory=self._memory)
        self._snapshot_step = self._newest_step = state.step
        self._thread = threading.Thread(target=self._write, args=(taken,), name="checkpoint")
        self._thread.start()
        if at_end or not self._config.save.background:
            self.finish(must=at_end)

    def finish(self, *, must: bool = False) -> None:
        """Wait for every rank's files and publish the checkpoint under way; a failure is logged.

        Raises ConfigError for a failure when the checkpoint `must` be there.
        """
        self._thread.join()
        partial = folder_for(self._run, self._snapshot_step)
        step, self._snapshot_step, self._thread = self._snapshot_step, None, None
        results = distributed.gather_objects(self._result)
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(results) if error is not None]
        if not errors and distributed.is_main():
            self._miss_the_last()
            try:
                files = {name: mark for written, _ in results for name, mark in written.items()}
                publish(partial, files, self._config.save)
            except OSError as error:
                errors = [str(error)]
        errors, whole = distributed.from_main((errors, newest(self._run)))
        if not errors:
            self._last = whole
            if distributed.is_main():
                log.info("saved %s", whole)
                self._published(whole)
            return
        self._newest_step = None
        said = f"the checkpoint of step {step} could not be written ({errors[0]}); the newest whole one: {whole}"
        if distributed.is_main():
            drop_partial(self._run)
            log.error("%s", said)
        if must:
            raise ConfigError(f"{said}: make room or set output_dir, then resume=auto goes on from there")

    def _miss_the_last(self) -> None:
        """Say when somebody has taken away the checkpoint before this one."""
        if self._last is not None and not self._last.exists():
            log.warning("%s is gone: it was removed under the run", self._last)

    def _write(self, taken: Taken) -> None:
        try:
            snapshot = joined(taken, self._group)
            self._result = write(snapshot, folder_for(self._run, snapshot.step)), None
        except Exception as error:  # noqa: BLE001  the thread's last words, which `finish` passes on to every rank
            self._result = {}, f"{type(error).__name__}: {error}"
