"""kd-accel train: fetch, features, objective, backward, step, log, save.

accelerate launch --config_file launch/zero2.yaml -m kd_accel train configs/demo.yaml data.batch_size=128
"""

from __future__ import annotations

import logging
import math
import os
from contextlib import closing, nullcontext
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch import Tensor

from kd_accel import assembly, checkpoint, distributed, resume
from kd_accel.bad_samples import count_bad_samples
from kd_accel.blame import non_finite_rows
from kd_accel.checkpoint import TrainState
from kd_accel.config import TrainConfig
from kd_accel.config_files import dump
from kd_accel.data.loader import TrainLoader, rows_per_micro_batch
from kd_accel.data.open import check_there
from kd_accel.data.stream_loader import StreamLoader
from kd_accel.engine import Engine
from kd_accel.environment import write_environment
from kd_accel.episodes import Episodes
from kd_accel.evals.during import TrainingEvaluation
from kd_accel.launch import end_accelerator, start_accelerator
from kd_accel.lost import told_in_one_line
from kd_accel.metrics import MetricsLog, Throughput
from kd_accel.objective import NonFiniteLoss
from kd_accel.optim import build_optimizer, learning_rates
from kd_accel.push.background import BackgroundPush
from kd_accel.saver import Saver
from kd_accel.schedules import Progress
from kd_accel.schema import ConfigError
from kd_accel.signals import StopSignals
from kd_accel.text_files import replace_text
from kd_accel.timing import Clock, span
from kd_accel.types import Batch

log = logging.getLogger("kd_accel")

STOPPED = "stopped"  # in a run's folder: a signal ended it before its last step, and resume=auto goes on


def run(config: TrainConfig) -> None:
    """Train to the end of `config.optim`, or to a signal; a run that is already there only says so.

    Raises ConfigError, and LocalError when another process of the run is lost, or memory is short.
    """
    torch.use_deterministic_algorithms(config.train.deterministic)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
    ends = told_in_one_line(
        waited=f"train.timeout_s={config.train.timeout_s:g}",
        workers="data.num_workers",
        smaller="lower data.batch_size and raise train.accumulate, or set student.grad_checkpointing=true",
        then="start again with resume=auto",
    )
    try:
        with ends:
            trainer = Trainer(config)
            try:
                trainer.train()
            finally:
                trainer.metrics.close()
    finally:
        end_accelerator()


class Trainer:
    """One run. Attributes, in the order in which they come to be:

    config, folder              what was asked for, where it is written
    accelerator                 the launch: processes, device, precision
    teachers, student           the models
    loader                      batches of this rank
    objective, engine           what turns features into a step
    episodes                    what clusters coming samples for `prototype` terms
    evaluation, push            when the student is evaluated, on what; and pushed to the Hub
    state                       where the run stands
    start_step, total_steps     where it began or went on, where it ends
    saver                       when checkpoints are written
    metrics, throughput         what it says
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.folder = Path(config.output_dir) / config.name
        resume_from = resume.find(config, self.folder)  # before anything is written or built
        self.evaluation = TrainingEvaluation(config, self.folder)
        self.push = BackgroundPush(config.hub, self.folder)
        self.accelerator = start_accelerator(
            precision=config.precision,
            grad_clip_norm=config.optim.grad_clip_norm,
            batch_size=_micro_batch_size(config),
            accumulate=config.train.accumulate,
            timeout_s=config.train.timeout_s,
        )
        with distributed.failing_together():
            self._check_data()
        set_seed(config.seed)  # weights start alike on every rank
        self.teachers = assembly.build_teachers(config)
        self.student = assembly.build_student(config, self.teachers)
        with distributed.failing_together():
            self.evaluation.check(self.student)
        self.config = config = assembly.fit_models(config, self.student, self.teachers)
        self.loader = self._build_loader()
        sizes = {"global_batch": self.loader.global_batch, "device": self.accelerator.device}
        assembly.quantise_student(config, self.student, **sizes)
        self.student.class_names = self.loader.class_names
        objective = assembly.build_objective(config, self.student, self.teachers, self.loader)
        self.objective = objective.to(self.accelerator.device)
        set_seed(config.seed + 1 + distributed.rank())  # dropout differs from here on
        optimizer = build_optimizer(self.student, config.optim)
        self.engine = Engine(self.accelerator, self.student, self.teachers, optimizer=optimizer, config=config)
        self.episodes = Episodes(
            self.objective, self.engine, loader=self.loader, build_loader=self._build_loader, seed=config.seed
        )
        self.state = TrainState(global_batch=self.loader.global_batch)
        self.total_steps = self._total_steps()
        self._open_folder(resume_from)

    def train(self) -> None:
        """Fetch, step, log, save, until the last step or a signal."""
        self._announce()
        # closed even by an error: its traceback would keep the loader's workers, and they the end of the process
        with closing(iter(self.loader)) as batches, StopSignals(active=self.config.save.on_signal) as signals:
            stopped = self._evaluate_if_due(signals)  # a resumed run may have been stopped in the middle of that
            while not stopped and self.state.step < self.total_steps:
                self.episodes.prepare(self.progress())
                due = self._row_is_due(self.state.step + 1)
                with Clock(self.accelerator.device) if due else nullcontext() as clock:
                    with self.throughput.waiting(), span("data"):
                        micro_batches = next(batches)
                    row = self.train_step(micro_batches)
                # once in a while: a row of metrics, a checkpoint, an evaluation
                if due:
                    self._count_bad_samples()
                    self._log(row, clock)
                stopped = self._save_if_due(signals) or self._evaluate_if_due(signals)
        if distributed.is_main():
            log.info("done: %s", checkpoint.newest(self.folder))
            if not stopped:  # who sends a signal does not wait for a push
                self.push.finish()

    def train_step(self, micro_batches: list[Batch]) -> dict:
        """One optimizer step; returns the row of metrics, tensors still on the device."""
        progress = self.progress()
        lr, temperature_lr = learning_rates(self.config.optim, progress, total_steps=self.total_steps)
        row = {"loss": math.nan, "temperature": progress.temperature, "lr": lr, "temperature_lr": temperature_lr}
        ids, labels = self._joined([b.ids for b in micro_batches]), self._joined([b.labels for b in micro_batches])
        student, teachers = self.engine.forward(micro_batches)
        try:
            with span("objective"):
                outcome = self.objective(student, teachers, progress, ids=ids, labels=labels)
        except NonFiniteLoss as error:
            self.engine.undo_statistics()
            self._skip(str(error))
            return row
        with span("backward"):
            self.engine.backward(outcome.gradients)
        with span("optimizer"):
            applied, grad_norm = self.engine.step(lr)
        row |= {"loss": outcome.loss, **outcome.metrics, "grad_norm": grad_norm}
        if not applied:
            rows = non_finite_rows({f"the gradient of {n}": g for n, g in outcome.gradients.items()}, ids)
            self._skip(f"a gradient is not finite: {', '.join(rows) or 'it became so in the student'}")
            return row
        with span("optimizer"):
            self.objective.step(progress, lr=lr, temperature_lr=temperature_lr)
            if self.config.train.ema_decay is not None:
                self.engine.masters.average(self.config.train.ema_decay)
        self.state.skipped_in_a_row = 0
        self._advance()
        return row

    def _skip(self, cause: str) -> None:
        """Count a step that changed nothing. Raises ConfigError, on every rank, after too many in a row."""
        self.state.skipped += 1
        self.state.skipped_in_a_row += 1
        said = f"step {self.state.step + 1}: {cause}"
        if self.state.skipped_in_a_row > self.config.train.max_skipped:
            if self.saver.is_under_way():
                self.saver.finish()
            raise ConfigError(
                f"{said}; {self.state.skipped_in_a_row} steps in a row were skipped (train.max_skipped="
                f"{self.config.train.max_skipped}): lower optim.lr or that term's weight, or look at those samples;"
                f" the newest checkpoint: {checkpoint.newest(self.folder)}"
            )
        if distributed.is_main():
            log.warning("%s; skipped", said)
        self._advance()

    def _row_is_due(self, step: int) -> bool:
        return step % self.config.log.every_steps == 0 or step == self.total_steps

    def _log(self, row: dict, clock: Clock) -> None:
        """One row of metrics; only here do the losses leave the device. `clock` saw the last step."""
        state = self.state
        where = {"step": state.step, "epoch": state.step / self.loader.steps_per_epoch, "samples": state.samples}
        counts = {"skipped": state.skipped, "bad_samples": state.bad_samples}
        values = {name: float(value) for name, value in row.items()}
        split = {f"seconds/{name}": passed for name, passed in clock.seconds().items()}
        self.metrics.log(where | values | counts | self.throughput.take() | split)

    def _advance(self) -> None:
        self.state.step += 1
        self.state.samples += self.loader.global_batch
        self.throughput.add(self.loader.global_batch)

    def progress(self) -> Progress:
        """Where the run stands before the next step."""
        epoch = self.state.step / self.loader.steps_per_epoch
        return Progress(self.state.step, epoch, self.state.samples, self.objective.temperature)

    def _save_if_due(self, signals: StopSignals) -> bool:
        """Save by step, by clock or by signal, as all ranks agree; whether the run is to stop here."""
        mine = [signals.received is not None, self.saver.time_is_up(), self.saver.is_writing()]
        stop, time_is_up, writing = distributed.any_rank(mine)
        at_end = stop or self.state.step == self.total_steps
        if self.saver.is_under_way() and (at_end or not writing):
            self.saver.finish()
        due = at_end or time_is_up or self.saver.is_due(self.state.step)
        if due and not self.saver.has(self.state.step):
            self._count_bad_samples()
            self.state.data = self.loader.state_dict()
            self.saver.save(engine=self.engine, objective=self.objective, state=self.state, at_end=at_end)
        if stop:
            signals.received = signals.received or "a signal to another rank"
            self._say_stopped(signals.received)
        return stop

    def _say_stopped(self, signal: str) -> None:
        """In the log, and in a file for launchers when steps are left; collective."""
        step = self.state.step
        if distributed.is_main():
            log.info("stopped by %s after step %d; resume=auto goes on", signal, step)
        if step < self.total_steps:
            distributed.on_main(lambda: replace_text(self.folder / STOPPED, f"{signal} after step {step}\n"))

    def _evaluate_if_due(self, signals: StopSignals) -> bool:
        """Evaluate the student by step; whether the run is to stop here, by a signal that came meanwhile."""
        lengths = {"steps_per_epoch": self.loader.steps_per_epoch, "total_steps": self.total_steps}
        if not self.evaluation.is_due(self.state.step, **lengths):
            return False
        self.evaluation.run(
            self.state.step,
            engine=self.engine,
            objective=self.objective,
            is_stopped=lambda: distributed.any_rank([signals.received is not None])[0],
            log_row=self.metrics.log,
            start_step=self.start_step,
        )
        self.throughput = Throughput()  # of training alone
        return self._save_if_due(signals)

    def _count_bad_samples(self) -> None:
        self.state.bad_samples = count_bad_samples(
            self.loader,
            self.folder / "bad_samples.jsonl",
            before=self.state.bad_samples,
            samples=self.state.samples,
            max_fraction=self.config.data.max_bad_fraction,
        )

    def _joined(self, parts: list[Tensor | None]) -> Tensor | None:
        return None if parts[0] is None else torch.cat(parts).to(self.accelerator.device)

    # Set-up -----------------------------------------------------------------------------------------------------------

    def _check_data(self) -> None:
        """Before a teacher is fetched. Raises ConfigError."""
        check_there(self.config.data)

    def _build_loader(self) -> TrainLoader | StreamLoader:
        return assembly.build_loader(self.config, self.student, self.teachers)

    def _total_steps(self) -> int:
        optim = self.config.optim
        if optim.samples is not None:
            return math.ceil(optim.samples / self.loader.global_batch)
        return optim.steps or optim.epochs * self.loader.steps_per_epoch

    def _open_folder(self, resume_from: Path | None) -> None:
        """Load the checkpoint, if any, and make the run's files."""
        said: list[str] = []
        resume_from, damaged = checkpoint.choose(resume_from, self.folder, may_go_back=self.config.resume == "auto")
        if resume_from is not None:
            said = resume.check_config(resume_from, self.config, global_batch=self.loader.global_batch)
            # first, because memory by sample id is only of the data that it was made with
            self.loader.load_state_dict(checkpoint.read_progress(resume_from).data)
            self.state = resume.restore(resume_from, engine=self.engine, objective=self.objective)
        self.start_step, self.state.total_steps = self.state.step, self.total_steps
        with distributed.failing_together():
            if distributed.is_main():
                self._make_folder()
            at = {"start_step": self.start_step, "total_steps": self.total_steps}
            self.metrics = MetricsLog(self.folder, self.config, accelerator=self.accelerator, **at)
        own = resume_from is not None and resume_from.parent == self.folder / "checkpoints"
        steps = {"steps_per_epoch": self.loader.steps_per_epoch, "total_steps": self.total_steps}
        self.saver = Saver(
            self.folder,
            self.config,
            published=self.push.checkpoint_written,
            newest_step=self.start_step if own else None,
            **steps,
        )
        self.throughput = Throughput()
        if not distributed.is_main():
            return
        for line in damaged:
            log.warning("%s", line)
        if resume_from is not None:
            log.info("resumed from %s", "; changed: ".join([str(resume_from), *said]))

    def _make_folder(self) -> None:
        try:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            (self.folder / STOPPED).unlink(missing_ok=True)
            replace_text(self.folder / "config.yaml", dump(self.config))
            write_environment(self.folder)
        except OSError as error:
            raise ConfigError(f"output_dir={self.config.output_dir}: cannot be written to ({error})") from None

    def _announce(self) -> None:
        """Say in sentences what the numbers of the config come to."""
        if not distributed.is_main():
            return
        loader, ranks = self.loader, distributed.world_size()
        engine = f"ZeRO-{self.engine.zero_stage}" if self.engine.zero_stage else "DDP" if ranks > 1 else "one process"
        log.info("%s, %s, on %s", engine, self.config.precision, self.accelerator.device)
        for name, blocks in self.engine.compiled.items():
            log.info("train.compile: %d blocks of %s%s", blocks, name, "" if blocks else ", which runs as it is")
        for line in assembly.remarks(self.config, self.student):
            log.warning("%s", line)
        self.evaluation.announce()
        micro_batches = f" x {loader.accumulate} micro-batches" if loader.accumulate > 1 else ""
        samples = "a stream" if loader.num_samples is None else f"{loader.num_samples} samples"
        log.info(
            f"{samples}; %d per process{micro_batches} x %d processes = %d samples per step; %d steps per epoch;"
            " %d steps in all",
            *(loader.batch_size, ranks, loader.global_batch, loader.steps_per_epoch),
            self.total_steps,
        )
        if held := self.objective.memory_bytes():
            memory = self.config.objective.memory
            log.info("memory by sample id: %s, %.1f MiB per process", memory, held / 2**20)


def _micro_batch_size(config: TrainConfig) -> int:
    """Samples per process and forward pass, known before the loader is, because DeepSpeed wants it first."""
    return rows_per_micro_batch(config.data, int(os.environ.get("WORLD_SIZE", "1")), config.train.accumulate)
