"""kd-accel doctor [TRAIN.yaml]: launched as the training will be, what would keep it from running; no weights are read.

    kd-accel doctor
    accelerate launch --config_file launch/zero2.yaml -m kd_accel doctor configs/fastclip_kd.yaml data.batch_size=128

One line per finding; no process waits longer than timeout_s for another one.
"""

from __future__ import annotations

import logging
import os

import torch

from kd_accel import distributed, processes
from kd_accel.config import TrainConfig
from kd_accel.data.loader import rows_per_micro_batch
from kd_accel.doctor import environment, rendezvous, training
from kd_accel.doctor.findings import Finding, checked, of_all_ranks, together
from kd_accel.doctor.rendezvous import Answer
from kd_accel.doctor_config import DoctorConfig
from kd_accel.launch import end_accelerator, start_accelerator
from kd_accel.lost import is_lost_peer
from kd_accel.schema import ConfigError

Report = list[Finding]


def run(config: DoctorConfig) -> int:
    """Print what was found; 1 when something of it is a failure, else 0."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        return _examine(config.training(), config.timeout_s)
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        said = f"rank {distributed.rank()}: another process died, or did not answer for {config.timeout_s:g} s"
        _tell([Finding("FAIL", "rendezvous", f"{said}: look at what it said last")])
        return 1
    finally:
        end_accelerator()


def _examine(config: TrainConfig | None, timeout_s: float) -> int:
    mine = environment.findings(config)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        answers, report = [Answer.of_this_rank(mine)], mine
        _tell(report)
    else:
        answers, report = _meet(mine, timeout_s)
        if _has_failed(report):  # what follows would wait for those that are missing, or cannot work
            return 1
        processes.start_process_group(timeout_s)
        report += _told(_exchanges(config, answers))
    if config is not None:
        report += _told(of_all_ranks(checked("launch", lambda: _launch(config, timeout_s))))
        report += _told(of_all_ranks(training.output_folder(config)))
        report += _told(of_all_ranks(training.findings(config)))
    distributed.barrier()  # a launcher ends the others as soon as one has ended
    return int(_has_failed(report))


def _meet(mine: Report, timeout_s: float) -> tuple[list[Answer | None], Report]:
    """(what each rank says of itself, what they found alone and whether they meet); the first of them tells it."""
    try:
        said = processes.roll_call(Answer.of_this_rank(mine).packed(), timeout_s)
    except ConfigError as error:
        failure = Finding("FAIL", "rendezvous", f"rank {os.environ['RANK']}: {error}")
        _tell([*mine, failure], aloud=True)
        return [], [failure]
    answers = [None if text is None else Answer.unpacked(text) for text in said]
    report = together([[] if answer is None else answer.findings for answer in answers])
    report += rendezvous.attendance(answers, timeout_s)
    first = next(rank for rank, answer in enumerate(answers) if answer is not None)
    _tell(report, aloud=os.environ["RANK"] == str(first))
    processes.end_roll_call(said, timeout_s)
    return answers, report


def _exchanges(config: TrainConfig | None, answers: list[Answer]) -> Report:
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    return [*rendezvous.agreement(config), *rendezvous.speed(answers, device)]


def _launch(config: TrainConfig, timeout_s: float) -> str:
    """The engine, as train starts it. Raises ConfigError."""
    accelerator = start_accelerator(
        precision=config.precision,
        grad_clip_norm=config.optim.grad_clip_norm,
        batch_size=rows_per_micro_batch(config.data, distributed.world_size(), config.train.accumulate),
        accumulate=config.train.accumulate,
        timeout_s=timeout_s,
    )
    ranks, plugin = accelerator.num_processes, accelerator.deepspeed_plugin
    parallel = "FSDP2" if accelerator.is_fsdp2 else "DDP" if ranks > 1 else "one process"
    return f"{f'ZeRO-{plugin.zero_stage}' if plugin else parallel}, {config.precision}, on {accelerator.device.type}"


def _told(report: Report) -> Report:
    _tell(report, aloud=distributed.is_main())
    return report


def _tell(report: Report, *, aloud: bool = True) -> None:
    if aloud:
        print("\n".join(map(str, report)), flush=True)


def _has_failed(report: Report) -> bool:
    return any(finding.status == "FAIL" for finding in report)
