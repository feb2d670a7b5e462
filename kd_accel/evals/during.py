"""Evaluation in the middle of training: the student as it is, on all ranks, and training goes on as without it.

Its rows are those of `kd-accel eval` on the checkpoint of that step: the release that lies there is what is evaluated.
It is written to a folder of its own and read back by every rank. The partitioned student could not be used as it is:
ranks have different numbers of batches, and one that is done would let the others wait inside a forward pass.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError

from kd_accel import distributed
from kd_accel.checkpoint import release_of
from kd_accel.engine import Engine
from kd_accel.evals.encoder import Encoder, load_encoder
from kd_accel.evals.find import find_sets
from kd_accel.evals.measure import measure
from kd_accel.evals.results import RESULTS, Row, append_row, columns, finished, read_results, weights_of, write_tables
from kd_accel.evals.sets import EvalSet
from kd_accel.models.release import write_release
from kd_accel.models.student import Student
from kd_accel.objective import Objective
from kd_accel.random_state import random_state, set_random_state
from kd_accel.replay import unchanged_buffers
from kd_accel.schema import ConfigError
from kd_accel.train_eval_config import TrainEvalConfig

log = logging.getLogger("kd_accel")


class TrainingEvaluation:
    """When the student of a run is evaluated, and on what."""

    def __init__(self, config: TrainEvalConfig | None, run: Path):
        """Without a config: never. Raises ConfigError for data that is not there."""
        self._config, self._run = config, run
        self._eval_sets = [] if config is None else find_sets(config.data)

    def check(self, student: Student) -> None:
        """Raises ConfigError for a student that is to be evaluated and cannot be by itself."""
        missing = {"image", "text"} - set(student.towers)
        if missing and self._config is not None:
            raise ConfigError(
                f"eval: the student has no {missing.pop()} tower to compare with: drop the section eval, and evaluate"
                " its checkpoints beside another model's tower, with kd-accel eval"
            )

    def is_due(self, step: int, *, total_steps: int) -> bool:
        """Alike on every rank."""
        if self._config is None:
            return False
        every = self._config.every_steps
        return (every is not None and step > 0 and step % every == 0) or (self._config.at_end and step == total_steps)

    def run(
        self,
        step: int,
        *,
        engine: Engine,
        objective: Objective,
        is_stopped: Callable[[], bool],
        log_row: Callable[[dict[str, float]], None],
        start_step: int,
    ) -> None:
        """Evaluate the student after `step`; collective. What goes wrong is an error line, for one set or for all.

        Sets that results.jsonl has of these weights are passed over. Before each set `is_stopped`, alike on every rank,
        may end it. `log_row` gets "eval/KEY/METRIC" of each set, but for what a run that was resumed at `start_step`
        has logged before.
        """
        before = random_state()
        try:
            encoder = self._encoder(step, engine, objective)
            known = self._known(encoder)
            for eval_set in self._eval_sets:
                if is_stopped():
                    break
                row = known.get((eval_set.name, eval_set.kind))
                is_new, row = row is None, row or self._evaluate(encoder, eval_set)
                if row is not None and (is_new or step > start_step):
                    log_row({"step": step} | {f"eval/{name}": value for name, value in columns(row).items()})
            self._on_main(lambda: write_tables(self._run / RESULTS))
        except ConfigError as error:
            _log_error(f"step {step} could not be evaluated ({error})")
        finally:
            set_random_state(before)

    def _encoder(self, step: int, engine: Engine, objective: Objective) -> Encoder:
        """The student of this step on every rank, as `load_encoder` finds it in a checkpoint."""
        with unchanged_buffers(engine.student):  # their mean over ranks is the checkpoint's, and not training's
            weights = engine.masters.weights()
        weights |= engine.masters.averages()
        folder = self._run / ".evaluated"
        self._on_main(lambda: _write(folder / "student", release_of(engine.student, objective, weights)))
        with distributed.failing_together():
            encoder = load_encoder(folder / "student")
        self._on_main(lambda: shutil.rmtree(folder, ignore_errors=True))
        return replace(encoder, name=self._run.resolve().name, step=step, home=self._run)

    def _known(self, encoder: Encoder) -> dict[tuple[str, str], Row]:
        """What results.jsonl has of this encoder."""
        rows: list[Row] = []
        self._on_main(lambda: rows.extend(read_results(self._run / RESULTS)))
        about = {"model": encoder.name, "step": encoder.step, "weights": weights_of(encoder)}
        return distributed.from_main(finished(rows, **about))

    def _evaluate(self, encoder: Encoder, eval_set: EvalSet) -> Row | None:
        """The row of a set, which is in results.jsonl then; None for a set that cannot be evaluated."""
        try:
            row = measure(encoder, eval_set, self._config)
            self._on_main(lambda: append_row(self._run / RESULTS, row))
        except ConfigError as error:
            _log_error(f"step {encoder.step}: {eval_set.name} could not be evaluated ({error})")
            return None
        return row

    @staticmethod
    def _on_main(act: Callable[[], None]) -> None:
        """Rank 0 acts, the others wait. Raises ConfigError, on every rank, where that fails."""
        with distributed.failing_together():
            if distributed.is_main():
                act()


def _write(folder: Path, release: dict) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed
    try:
        write_release(folder, **release)
    except SafetensorError as error:  # a full disk, in the words of safetensors
        raise OSError(str(error)) from None


def _log_error(line: str) -> None:
    if distributed.is_main():
        log.error("%s", line)
