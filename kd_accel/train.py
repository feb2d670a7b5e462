"""kd-accel train: fetch, features, objective, backward, step, log, save.

accelerate launch --config_file launch/zero2.yaml -m kd_accel train configs/demo.yaml data.batch_size=128
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from accelerate.utils import set_seed
from torch import Tensor

from kd_accel import checkpoint, distributed
from kd_accel.checkpoint import TrainState
from kd_accel.config import TrainConfig, teachers_of
from kd_accel.data.loader import TrainLoader
from kd_accel.engine import Engine
from kd_accel.episodes import Episodes
from kd_accel.fit import check_class_width, check_fit
from kd_accel.launch import end_accelerator, start_accelerator
from kd_accel.metrics import MetricsLog, Throughput, write_environment
from kd_accel.models.class_embeddings import class_embeddings
from kd_accel.models.student import Student
from kd_accel.models.teacher import Teacher
from kd_accel.objective import NonFiniteLoss, Objective
from kd_accel.optim import build_optimizer, learning_rates
from kd_accel.schedules import Progress
from kd_accel.schema import ConfigError, dump
from kd_accel.terms import LabelCE, MaskedFeatureMSE

log = logging.getLogger("kd_accel")

MIN_SAMPLES_TO_JUDGE = 10_000  # or one epoch: before that a few bad samples say nothing of the share


def run(config: TrainConfig) -> None:
    """Train to the end of `config.optim`; a run that is already there only says so. Raises ConfigError."""
    try:
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
    student, teachers           the models
    loader                      batches of this rank
    engine, objective           what turns features into a step
    episodes                    what clusters coming samples for `prototype` terms
    state, total_steps          where the run stands, where it ends
    metrics, throughput         what it says
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.folder = Path(config.output_dir) / config.name
        resume_from = checkpoint.find(config, self.folder)  # before anything is written or built
        self.accelerator = start_accelerator(
            precision=config.precision, grad_clip_norm=config.optim.grad_clip_norm, batch_size=_batch_size(config)
        )
        set_seed(config.seed)  # weights start alike on every rank
        self.teachers = {name: Teacher(section, name=name) for name, section in teachers_of(config).items()}
        self.student = self._build_student()
        self.loader = self._build_loader()
        self.objective = self._build_objective().to(self.accelerator.device)
        set_seed(config.seed + 1 + distributed.rank())  # dropout differs from here on
        optimizer = build_optimizer(self.student, config.optim)
        self.engine = Engine(self.accelerator, self.student, self.teachers, optimizer=optimizer, config=config)
        self.total_steps = config.optim.steps or config.optim.epochs * self.loader.steps_per_epoch
        self.episodes = Episodes(
            self.objective, self.engine, loader=self.loader, build_loader=self._build_loader, seed=config.seed
        )
        self.state = TrainState(global_batch=self.loader.global_batch)
        self._open_folder(resume_from)

    def train(self) -> None:
        """Fetch, step, log, save, until the last step."""
        self._announce()
        batches = iter(self.loader)
        while self.state.step < self.total_steps:
            self.episodes.prepare(self._progress())
            with self.throughput.waiting():
                batch = next(batches).to(self.accelerator.device)
            row = self._train_step(batch)
            # once in a while: a row of metrics, a checkpoint
            if self.state.step % self.config.log.every_steps == 0 or self.state.step == self.total_steps:
                self._count_bad_samples()
                self._log(row)
            if self._save_is_due():
                self._save()
        if distributed.is_main():
            log.info("done: %s", checkpoint.newest(self.folder))

    def _train_step(self, batch) -> dict:
        """One optimizer step; returns the row of metrics, tensors still on the device."""
        progress = self._progress()
        lr, temperature_lr = learning_rates(self.config.optim, progress, total_steps=self.total_steps)
        student, teachers = self.engine.forward(batch)
        try:
            outcome = self.objective(student, teachers, progress, ids=batch.ids, labels=batch.labels)
        except NonFiniteLoss as error:
            raise NonFiniteLoss(f"step {progress.step + 1}: {error} (sample ids {batch.ids.tolist()})") from None
        self.engine.backward(student, outcome.gradients)
        applied, grad_norm = self.engine.step(lr)
        if applied:
            self.objective.step(progress, lr=lr, temperature_lr=temperature_lr)
        self._advance(applied)
        return {
            "loss": outcome.loss,
            **outcome.metrics,
            "temperature": progress.temperature,
            "lr": lr,
            "temperature_lr": temperature_lr,
            "grad_norm": grad_norm,
        }

    def _log(self, row: dict) -> None:
        """One row of metrics; only here do the losses leave the device."""
        state = self.state
        where = {"step": state.step, "epoch": state.step / self.loader.steps_per_epoch, "samples": state.samples}
        counts = {"skipped": state.skipped, "bad_samples": state.bad_samples}
        values = {name: float(value) for name, value in row.items()}
        self.metrics.log(where | values | counts | self.throughput.take())

    def _advance(self, applied: bool) -> None:
        self.state.step += 1
        self.state.samples += self.loader.global_batch
        self.state.skipped += not applied
        self.throughput.add(self.loader.global_batch)

    def _progress(self) -> Progress:
        """Where the run stands before the next step."""
        epoch = self.state.step / self.loader.steps_per_epoch
        return Progress(self.state.step, epoch, self.state.samples, self.objective.temperature)

    def _save_is_due(self) -> bool:
        every = self.config.save.every_steps or self.loader.steps_per_epoch
        return self.state.step % every == 0 or self.state.step == self.total_steps

    def _save(self) -> None:
        self._count_bad_samples()
        self.state.data = self.loader.state_dict()
        path = checkpoint.save(
            self.folder, engine=self.engine, objective=self.objective, state=self.state, config=self.config
        )
        if distributed.is_main():
            log.info("saved %s", path)

    def _count_bad_samples(self) -> None:
        """List the unreadable samples of all ranks; raises ConfigError, on all of them, when they are too many."""
        records = [record for ranks in distributed.gather_objects(self.loader.take_bad()) for record in ranks]
        if not records:
            return
        self.state.bad_samples += len(records)
        path = self.folder / "bad_samples.jsonl"
        if distributed.is_main():
            with path.open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
            log.warning("%d unreadable samples replaced so far, the last: %s", self.state.bad_samples, records[-1])
        judged = max(self.state.samples, min(self.loader.num_samples, MIN_SAMPLES_TO_JUDGE))
        if self.state.bad_samples > self.config.data.max_bad_fraction * judged:
            last = records[-1]
            raise ConfigError(
                f"data.max_bad_fraction={self.config.data.max_bad_fraction} allows fewer than the"
                f" {self.state.bad_samples} unreadable samples so far; the last: {last['shard']}, sample {last['key']}:"
                f" {last['reason']}; all of them: {path}"
            )

    # Set-up -----------------------------------------------------------------------------------------------------------

    def _build_student(self) -> Student:
        """With the masked view that a term asks for."""
        ratios = {t.mask_ratio for t in self.config.objective.terms.values() if isinstance(t, MaskedFeatureMSE)}
        if len(ratios) > 1:
            raise ConfigError(f"objective.terms: masked_feature_mse with mask_ratio {sorted(ratios)}: one view is made")
        dims = {name: teacher.embed_dim for name, teacher in self.teachers.items()}
        return Student(self.config.student, dims, mask_ratio=next(iter(ratios), None))

    def _build_loader(self) -> TrainLoader:
        models = {"student": self.student, **self.teachers}
        return TrainLoader(
            self.config.data,
            contracts={name: model.contract for name, model in models.items()},
            seed=self.config.seed,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )

    def _build_objective(self) -> Objective:
        config = self.config.objective
        specs = {name: teacher.spec for name, teacher in self.teachers.items()}
        num_samples, global_batch = self.loader.num_samples, self.loader.global_batch
        check_fit(
            config, widths=self.student.widths, teachers=specs, num_samples=num_samples, global_batch=global_batch
        )
        return Objective(
            config,
            log_scale=self.student.scale.log_scale,
            teachers=specs,
            widths=self.student.widths,
            num_ids=num_samples,
            class_embeddings=self._class_embeddings(),
            betas=self.config.optim.betas,
            eps=self.config.optim.eps,
        )

    def _class_embeddings(self) -> dict[str, Tensor]:
        """[C, d] by the term that uses them. Raises ConfigError when they are not of the student's width."""
        found = {}
        for name, term in self.config.objective.terms.items():
            if not isinstance(term, LabelCE) or term.classes is None:
                continue
            key = f"objective.terms.{name}.classes"
            teacher = self.teachers.get(term.teacher or next(iter(self.teachers), None))
            found[name] = class_embeddings(term.classes, templates=term.templates, teacher=teacher, key=key)
            check_class_width(key, found[name], self.student.widths)
        return found

    def _open_folder(self, resume_from: Path | None) -> None:
        """Load the checkpoint, if any, and make the run's files."""
        changes: list[str] = []
        if resume_from is not None:
            changes = checkpoint.check_config(resume_from, self.config, global_batch=self.loader.global_batch)
            self.state = checkpoint.restore(resume_from, engine=self.engine, objective=self.objective)
            self.loader.load_state_dict(self.state.data)
        if distributed.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(dump(self.config))
            write_environment(self.folder)
        distributed.barrier()
        at = {"start_step": self.state.step, "total_steps": self.total_steps}
        self.metrics = MetricsLog(self.folder, self.config, accelerator=self.accelerator, **at)
        self.throughput = Throughput()
        if distributed.is_main() and resume_from is not None:
            log.info("resumed from %s", "; changed: ".join([str(resume_from), *changes]))

    def _announce(self) -> None:
        """Say in sentences what the numbers of the config come to."""
        if not distributed.is_main():
            return
        loader, ranks = self.loader, distributed.world_size()
        engine = f"ZeRO-{self.engine.zero_stage}" if self.engine.zero_stage else "DDP" if ranks > 1 else "one process"
        log.info("%s, %s, on %s", engine, self.config.precision, self.accelerator.device)
        log.info(
            "%d samples; %d per process x %d processes = %d samples per step; %d steps per epoch; %d steps in all",
            *(loader.num_samples, loader.batch_size, ranks, loader.global_batch, loader.steps_per_epoch),
            self.total_steps,
        )


def _batch_size(config: TrainConfig) -> int:
    """Samples per process and step, known before the loader is, because DeepSpeed wants it first."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return config.data.batch_size or max(1, config.data.global_batch_size // ranks)
