"""Evaluation in the middle of training: the student as it is, on all ranks, and training goes on as without it.

Its rows are those of `kd-accel eval` on the checkpoint of that step: the release that lies there is what is evaluated.
It is written to a folder of its own and read back by every rank. The partitioned student could not be used as it is:
ranks have different numbers of batches, and one that is done would let the others wait inside a forward pass.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError

from kd_accel import distributed
from kd_accel.config import TrainConfig, teachers_of
from kd_accel.engine import Engine
from kd_accel.evals.encoder import Encoder, load_encoder, with_tower
from kd_accel.evals.evaluate import evaluate
from kd_accel.evals.model_towers import ModelImages, ModelTexts
from kd_accel.evals.plan import Plan, make_plan
from kd_accel.evals.results import RESULTS, columns
from kd_accel.models.release import write_release
from kd_accel.models.student import Student
from kd_accel.objective import Objective
from kd_accel.random_state import random_state, set_random_state
from kd_accel.replay import unchanged_buffers
from kd_accel.schema import ConfigError
from kd_accel.snapshot import release_of

log = logging.getLogger("kd_accel")


class TrainingEvaluation:
    """When the student of a run is evaluated, and on what."""

    def __init__(self, config: TrainConfig, run: Path):
        """Without the section `eval`: never. Raises ConfigError for data that is not there."""
        self._config, self._run, self._teachers = config.eval, run, teachers_of(config)
        with _in_section():
            self._plan = Plan([], {}) if config.eval is None else make_plan(config.eval)

    def announce(self) -> None:
        """Say which tasks have no data."""
        for key, places in self._plan.skipped.items():
            _log(logging.WARNING, f"eval: skipped {key}: looked for {', '.join(places)}")

    def check(self, student: Student) -> None:
        """Raises ConfigError for a student that cannot be evaluated, and for a tower that does not fit it."""
        if self._config is None:
            return
        contract, width = student.contract, student.embed_dim
        image = None if contract.image is None else ModelImages(student.clip, contract.image, width)
        text = None if contract.text is None else ModelTexts(student.clip, contract.text, width)
        with _in_section():
            encoder = self._joined(Encoder(self._run.name, None, self._run, image, text))
        missing = {"image", "text"} - encoder.towers
        by_images = self._config.probe is not None or student.class_head is not None
        if missing and not (missing == {"text"} and by_images):
            tower = missing.pop()
            raise ConfigError(
                f"eval: the student has no {tower} tower to compare with: set eval.{tower}_from to a model, or to run,"
                " its teacher, where that is as wide; or drop the section eval"
            )

    def is_due(self, step: int, *, steps_per_epoch: int, total_steps: int) -> bool:
        """Alike on every rank."""
        if self._config is None:
            return False
        epochs = self._config.every_epochs
        lengths = [self._config.every_steps, epochs and epochs * steps_per_epoch]
        in_between = step > 0 and any(length and step % length == 0 for length in lengths)
        return in_between or (self._config.at_end and step == total_steps)

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

        What results.jsonl has of these weights is not measured again. After each row `is_stopped`, alike on every rank,
        may end it. `log_row` gets "eval/KEY/METRIC" of each set, but for what a run that was resumed at `start_step`
        has logged before.
        """
        before = random_state()
        try:
            encoder = self._encoder(step, engine, objective)
            with closing(evaluate(encoder, self._plan.jobs, self._config, output=self._run / RESULTS)) as rows:
                for row, is_new in rows:
                    if is_new or step > start_step:
                        log_row({"step": step} | {f"eval/{name}": value for name, value in columns(row).items()})
                    if is_stopped():
                        break
        except ConfigError as error:
            for line in str(error).splitlines():
                _log(logging.ERROR, f"evaluation of step {step}: {line}")
        finally:
            set_random_state(before)

    def _encoder(self, step: int, engine: Engine, objective: Objective) -> Encoder:
        """The student of this step on every rank, as `load_encoder` finds it in a checkpoint."""
        with unchanged_buffers(engine.student):  # their mean over ranks is the checkpoint's, and not training's
            weights = engine.masters.weights()
        weights |= engine.masters.averages()
        folder = self._run / ".evaluated"
        scale = objective.log_logit_scale, objective.bias
        distributed.on_main(lambda: _write(folder / "student", release_of(engine.student, weights, *scale)))
        with distributed.failing_together():
            encoder = load_encoder(folder / "student")
            encoder = self._joined(replace(encoder, name=self._run.resolve().name, step=step, home=self._run))
        distributed.on_main(lambda: shutil.rmtree(folder, ignore_errors=True))
        return encoder

    def _joined(self, encoder: Encoder) -> Encoder:
        """With the towers of other models that the section names, as `kd-accel eval` has them."""
        for tower in ("image", "text"):
            if (source := getattr(self._config, f"{tower}_from")) is not None:
                encoder = with_tower(encoder, tower, source, teachers=self._teachers)
        return encoder


@contextmanager
def _in_section() -> Iterator[None]:
    """Errors say which section of the config they are about."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError("\n".join(f"eval: {line}" for line in str(error).splitlines())) from None


def _write(folder: Path, release: dict) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed
    try:
        write_release(folder, **release)
    except SafetensorError as error:  # a full disk, in the words of safetensors
        raise OSError(str(error)) from None


def _log(level: int, line: str) -> None:
    if distributed.is_main():
        log.log(level, "%s", line)
