"""Launch files through `accelerate launch`, as in the README: what trains on two CPU processes, what is refused."""

import json
import sys

import pytest
import tiny
from conftest import run_process

from kd_accel import checkpoint

pytestmark = pytest.mark.distributed

ACCELERATE = [sys.executable, "-c", "from accelerate.commands.accelerate_cli import main; main()", "launch"]


def command(launcher: str, folder, shards, teacher) -> list[str]:
    return [
        *ACCELERATE, "--config_file", f"launch/{launcher}.yaml", "-m", "kd_accel", "train", "name=run",
        f"output_dir={folder}", f"data={{shards: {shards}, batch_size: 4, num_workers: 1}}",
        f"student.arch={json.dumps(tiny.arch())}", "student.projector=linear", f"teacher.path={teacher}",
        "objective.terms={clip: {kind: clip}, feature: {kind: feature_mse}}", "optim={lr: 0.01, steps: 3}",
        "train={accumulate: 2, ema_decay: 0.9}", "log.every_steps=1",
    ]  # fmt: skip


def test_zero3_offload_trains(tmp_path, train_shards, tiny_teacher):
    """bf16, two processes, two micro-batches, a moving average; the checkpoint is whole."""
    run_process(command("zero3_offload", tmp_path, train_shards, tiny_teacher))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["samples"], row["skipped"]) for row in rows] == [(1, 16, 0), (2, 32, 0), (3, 48, 0)]
    newest = checkpoint.newest(tmp_path / "run")
    assert checkpoint.damage(newest) is None
    assert (newest / "student_ema" / "open_clip_model.safetensors").is_file()


def test_fsdp2_is_refused_without_a_gpu(tmp_path, train_shards, tiny_teacher):
    """One line, and nothing written."""
    words = command("fsdp2", tmp_path, train_shards, tiny_teacher)
    output = run_process(words, env={"PATH": "", "HOME": str(tmp_path)}, code=1)
    said = [line for line in output.splitlines() if line.startswith("error: Accelerate runs FSDP on GPUs only")]
    assert len(said) == 1  # the launcher repeats it, indented
    assert not (tmp_path / "run").exists()
