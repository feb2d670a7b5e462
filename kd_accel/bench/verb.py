"""kd-accel bench TRAIN.yaml: some steps of a training, and where their time goes.

    accelerate launch --config_file launch/zero2.yaml -m kd_accel bench configs/fastclip_kd.yaml input=synthetic

The steps are those of `train`, with every part of it; the run's folder is a temporary one.
"""

from __future__ import annotations

import json
import resource
import shutil
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from kd_accel import assembly, distributed
from kd_accel.bench.synthetic import SyntheticLoader
from kd_accel.bench_config import BenchConfig
from kd_accel.data.loader import rows_per_micro_batch
from kd_accel.plan.devices import this_device
from kd_accel.plan.shapes import shapes_only
from kd_accel.plan.step import inputs, student_cost, teachers_cost
from kd_accel.text_files import replace_text
from kd_accel.timing import Clock, span
from kd_accel.train import Trainer


@dataclass(frozen=True)
class Timing:
    """Means over the measured steps and all ranks; seconds, bytes and samples of all ranks."""

    device: str
    world_size: int
    global_batch: int
    samples_per_second: float
    step_seconds: float
    seconds: dict[str, float]  # of a step, by span
    mfu: dict[str, float]  # share of the device's peak: student and teachers in their own spans, all in the step
    peak_flops: float  # of a device
    peak_memory: int  # of the process that takes most
    checkpoint_stall: float  # seconds that training waits for a checkpoint in the background
    checkpoint_seconds: float  # until it is there


def run(config: BenchConfig) -> None:
    """Print the table. Raises ConfigError for whatever training would refuse."""
    folder = Path(config.output_dir) / f".bench_{config.name}"
    trainer = _Trainer(_benched(config, folder), config.input)
    try:
        timing = _measure(trainer, config)
    finally:
        trainer.metrics.close()
        distributed.barrier()
        if distributed.is_main():
            shutil.rmtree(folder)
    if distributed.is_main():
        print(in_words(timing))
        if config.output is not None:
            replace_text(Path(config.output), json.dumps(asdict(timing), indent=1) + "\n")


class _Trainer(Trainer):
    def __init__(self, config: BenchConfig, given: str):
        self._given = given
        super().__init__(config)

    def _check_data(self) -> None:
        if self._given == "data":
            super()._check_data()

    def _build_loader(self):
        if self._given == "data":
            return super()._build_loader()
        contracts = {name: model.wants for name, model in {"student": self.student, **self.teachers}.items()}
        stored = {
            name: dict.fromkeys(store.towers, self.teachers[name].embed_dim)
            for name, store in assembly.open_stores(self.config).items()
        }
        ranks, accumulate = distributed.world_size(), self.config.train.accumulate
        rows = rows_per_micro_batch(self.config.data, ranks, accumulate)
        return SyntheticLoader(contracts, stored, batch_size=rows, accumulate=accumulate, world_size=ranks)


def _benched(config: BenchConfig, folder: Path) -> BenchConfig:
    """Without what a benchmark must not touch or wait for."""
    steps = {"steps": config.warmup + config.measured, "epochs": None, "samples": None}
    return config.model_copy(
        update={
            "output_dir": str(folder),
            "resume": "never",
            "optim": config.optim.model_copy(update=steps),
            "save": config.save.model_copy(update={"background": True, "on_signal": False}),
            "log": config.log.model_copy(update={"trackers": []}),
            "eval": None,
            "hub": None,
        }
    )


def _measure(trainer: Trainer, config: BenchConfig) -> Timing:
    device = trainer.accelerator.device
    splits: list[dict[str, float]] = []
    with closing(iter(trainer.loader)) as batches:
        for step in range(config.warmup + config.measured):
            if step == config.warmup:
                if step:
                    _checkpoint_seconds(trainer)  # the first waits for the memory of its copy, which stays
                _wait(device)
                began = time.perf_counter()
            trainer.episodes.prepare(trainer.progress())
            with Clock(device) as clock:
                with span("data"):
                    micro_batches = next(batches)
                trainer.train_step(micro_batches)
            if step >= config.warmup:
                splits.append(clock.seconds())
        _wait(device)
        step_seconds = (time.perf_counter() - began) / config.measured
    stall, whole = _checkpoint_seconds(trainer)
    return _over_ranks(trainer, config, splits, step_seconds, stall, whole)


def _checkpoint_seconds(trainer: Trainer) -> tuple[float, float]:
    """(that training waits for a checkpoint in the background, until it is there), on this rank."""
    saved = {"engine": trainer.engine, "objective": trainer.objective, "state": trainer.state}
    began = time.perf_counter()
    trainer.saver.save(**saved, at_end=False)
    stall = time.perf_counter() - began
    trainer.saver.finish()
    return stall, time.perf_counter() - began


def _over_ranks(
    trainer: Trainer, config: BenchConfig, splits: list[dict[str, float]], step: float, stall: float, whole: float
) -> Timing:
    """The means; of memory and checkpoint the largest. Collective."""
    device, batch = trainer.accelerator.device, trainer.loader.global_batch
    mine = {name: sum(split.get(name, 0.0) for split in splits) / len(splits) for name in splits[0]}
    everyone = distributed.gather_objects((mine, step, stall, whole, _peak_memory(device)))
    ranks = len(everyone)
    seconds = {name: sum(split[name] for split, *_ in everyone) / ranks for name in mine}
    step = max(step for _, step, *_ in everyone)
    found = this_device(device, bf16=config.precision == "bf16")
    return Timing(
        device=found.name,
        world_size=ranks,
        global_batch=batch,
        samples_per_second=batch / step,
        step_seconds=step,
        seconds=seconds,
        mfu=_mfu(_flops(trainer, config), seconds, step, found.flops),
        peak_flops=found.flops,
        peak_memory=max(memory for *_, memory in everyone),
        checkpoint_stall=max(stall for _, _, stall, _, _ in everyone),
        checkpoint_seconds=max(whole for _, _, _, whole, _ in everyone),
    )


def _flops(trainer: Trainer, config: BenchConfig) -> dict[str, float]:
    """Of one step of one process: `student` with its backward pass, `teacher`. Of captions at full length."""
    rows, parts = trainer.loader.batch_size, trainer.loader.accumulate
    with shapes_only():
        teachers = assembly.build_teachers(config, weights=False)
        student = assembly.build_student(config, teachers, weights=False)
        assembly.fit_models(config, student, teachers)
        given = inputs(student, teachers, rows=rows)
        own, taught = student_cost(student, given, bf16=False, zero=False), teachers_cost(teachers, given, bf16=False)
    forward = own.forward * (2 if parts > 1 else 1)
    return {"student": parts * (forward + own.backward), "teacher": parts * sum(taught.flops.values())}


def _mfu(flops: dict[str, float], seconds: dict[str, float], step: float, peak: float) -> dict[str, float]:
    """Shares of `peak`: of the student in its forward and backward passes, of teachers in theirs, of all in a step."""
    spent = {"student": seconds["student"] + seconds["backward"], "teacher": seconds["teacher"]}
    found = {name: flops[name] / (spent[name] * peak) for name in flops if flops[name]}
    return found | {"step": sum(flops.values()) / (step * peak)}


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_words(timing: Timing) -> str:
    """The split of a step as a table, and what it comes to."""
    whole = sum(timing.seconds.values())
    lines = [f"  {name:10} {1e3 * s:10.2f} ms {s / whole:7.1%}" for name, s in timing.seconds.items()]
    shares = ", ".join(f"{name} {value:.1%}" for name, value in timing.mfu.items())
    stall, whole_checkpoint = timing.checkpoint_stall, timing.checkpoint_seconds
    return "\n".join(
        [
            f"{timing.world_size} x {timing.device}, {timing.global_batch} samples per step",
            *lines,
            f"  {'step':10} {1e3 * timing.step_seconds:10.2f} ms; {timing.samples_per_second:,.1f} samples/s",
            f"MFU: {shares} (peak {timing.peak_flops / 1e12:,.2f} TFLOP/s)",
            f"memory: {timing.peak_memory / 1e9:.2f} GB of the process that takes most",
            f"checkpoint: training waits {stall:.3f} s, it is there after {whole_checkpoint:.3f} s",
        ]
    )
