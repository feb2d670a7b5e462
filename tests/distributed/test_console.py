"""What stands last on the console of a launcher: why the run failed, in the words of the rank that knows."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
from conftest import REPO, run_process
from distributed.test_launch import ACCELERATE, command

from kd_accel import cli, verbs
from kd_accel.schema import ConfigError, LocalError, LostPeerError

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
WITH_ACCELERATE = [*ACCELERATE, "--config_file", "launch/ddp.yaml"]


def cause(output: str) -> str:
    """What a launcher names as the cause, which is the end of its output."""
    assert output.rstrip().endswith("=" * 60)
    return output.rpartition("Root Cause")[2]


@pytest.mark.distributed
@pytest.mark.parametrize("launcher", [TORCHRUN, pytest.param(WITH_ACCELERATE, marks=pytest.mark.slow)])
def test_the_traceback_of_the_rank_that_failed(launcher, tmp_path, train_shards, tiny_teacher):
    """Not the complaint of the other one, which loses its peer and is the first of all ranks to be looked at."""
    words = command("ddp", tmp_path, train_shards, tiny_teacher)
    words = words[words.index("train") :] + ["optim.steps=9", "precision=fp32"]
    worker = str(REPO / "tests" / "distributed" / "fault_worker.py")
    output = run_process([*launcher, worker, *words], env={"FAULT": "bug"}, code=1)
    said = cause(output)
    assert "rank      : 1 (local_rank: 1)" in said
    assert "RuntimeError: a bug" in said
    assert "fault_worker.py" in said.partition("Traceback")[2]


@pytest.mark.distributed
def test_a_users_mistake(tmp_path, train_shards, tiny_teacher):
    """Its line, without a traceback."""
    words = command("ddp", tmp_path, train_shards, tiny_teacher)
    words = words[words.index("train") :] + ["precision=fp8"]
    said = cause(run_process([*TORCHRUN, "-m", "kd_accel", *words], code=1))
    assert "rank      : 0 (local_rank: 0)" in said
    assert "traceback : error: precision: should be 'bf16' or 'fp32'" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("error", "rank", "printed", "knows"),
    [
        (ConfigError, 0, True, True),
        (ConfigError, 1, False, False),
        (LocalError, 1, True, True),
        (LostPeerError, 0, True, False),
        (LostPeerError, 1, True, False),
    ],
)
def test_who_knows_is_the_first_to_end(error, rank, printed, knows, monkeypatch, tmp_path, capsys):
    """The others stay for a while: a launcher blames the first that it sees end, and then ends them."""

    def run(config):
        raise error("wrong")

    target, stayed, file = ModuleType("target"), [], tmp_path / "error.json"
    target.run = run
    monkeypatch.setitem(sys.modules, "target", target)
    monkeypatch.setitem(verbs.VERBS, "index", ("kd_accel.index_config:IndexConfig", "target:run", "for this test"))
    monkeypatch.setattr(cli.time, "sleep", stayed.append)
    for name, value in {"RANK": rank, "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_ERROR_FILE": file}.items():
        monkeypatch.setenv(name, str(value))
    assert cli.main(["index", "a"]) == 2
    assert capsys.readouterr().err == "error: wrong\n" * printed
    assert bool(stayed) != knows
    assert file.exists() == knows
    if knows:
        assert json.loads(file.read_text())["message"]["message"] == "error: wrong"
