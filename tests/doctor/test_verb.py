"""The verb: what it prints, how it ends, alone and launched like a training."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from conftest import REPO, run_process
from distributed.test_launch import ACCELERATE

from kd_accel import cli

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
DOCTOR = ["-m", "kd_accel", "doctor"]


def lines(output: str) -> dict[str, str]:
    """What was looked at -> the rest of its last line, status first."""
    matches = re.finditer(r"^(ok|warn|FAIL)  +([a-z -]+): (.*)$", output, re.MULTILINE)
    return {match[2]: f"{match[1]} {match[3]}" for match in matches}


def test_alone_without_a_config(capsys):
    """Environment and devices."""
    assert cli.main(["doctor"]) == 0
    assert lines(capsys.readouterr().out).keys() == {"versions", "devices"}


def test_alone_with_a_config(train_yaml, capsys):
    assert cli.main(["doctor", str(train_yaml)]) == 0
    found = lines(capsys.readouterr().out)
    assert found["launch"] == "ok one process, fp32, on cpu"
    assert found["batch"].endswith("= 4 samples")
    assert "FAIL" not in " ".join(found.values())


def test_a_failure_is_the_exit_code(train_yaml, capsys):
    """And the rest is looked at all the same."""
    assert cli.main(["doctor", str(train_yaml), "data.shards=nowhere"]) == 1
    found = lines(capsys.readouterr().out)
    assert found["data"].startswith("FAIL")
    assert found["disk"].startswith("ok")


def test_a_mistake_in_the_config_is_trains(train_yaml, capsys):
    """Every line of it, and the nearest key."""
    assert cli.main(["doctor", str(train_yaml), "precision=fp8", "optim.lrr=3"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert cli.main(["config", str(train_yaml), "precision=fp8", "optim.lrr=3"]) == 2
    assert err == capsys.readouterr().err.splitlines()
    assert len(err) == 2


@pytest.mark.distributed
def test_two_healthy_ranks(train_yaml, tmp_path):
    """ZeRO-2 as train starts it; nothing is left behind."""
    words = [*ACCELERATE, "--config_file", "launch/zero2.yaml", *DOCTOR, str(train_yaml), "precision=bf16"]
    found = lines(run_process(words))
    assert found["rendezvous"] == "ok 2 ranks on 1 machine"
    assert found["launch"] == "ok ZeRO-2, bf16, on cpu"
    assert found["output"].endswith("is the same for all")
    assert found["batch"].endswith("= 8 samples")
    assert {value.split()[0] for what, value in found.items() if what != "precision"} == {"ok"}
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_machines_that_differ(train_yaml, tmp_path):
    """Three of them, the last with another clock, seed and disk; all of it is said by rank 0, and once."""
    other = tmp_path / "other"
    (other / "runs").mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    script = [str(REPO / "tests" / "doctor" / "doctor_worker.py"), str(other), "doctor", str(train_yaml)]
    launch = [*TORCHRUN, "--nproc_per_node=3", *script, "output_dir=runs"]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = str(REPO)
    done = subprocess.run(launch, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1, done.stderr
    found = lines(done.stdout)
    assert len(re.findall("^(?:ok|warn|FAIL)", done.stdout, re.MULTILINE)) == len(found) + 1  # output is said by both
    assert found["rendezvous"] == "ok 3 ranks on 3 machines"
    assert found["clocks"].startswith("warn rank 2: up to +100.0 s beside rank 0's")
    assert found["config"].startswith("FAIL rank 2: seed is 7, on rank 0 0")
    assert found["seed"].startswith("FAIL rank 2: the first numbers is ")
    assert "(median of 3 pairs)" in found["links"]
    assert "FAIL  output: ranks 0-1: output_dir=runs is not the folder of rank 2" in done.stdout
    assert "FAIL  output: rank 2: output_dir=runs is not the folder of rank 0" in done.stdout
    assert list(other.rglob("*")) == [other / "runs"]
    assert list((tmp_path / "runs").iterdir()) == []


def by_hand(rank: int, world_size: int, port: int, *words: str, program: list[str] = DOCTOR) -> subprocess.Popen:
    """A rank as SLURM starts it: no launcher has a time of its own. Cold, since it silences torch before the import."""
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPO)}
    env = {**os.environ, **quiet, **{key: str(value) for key, value in env.items()}}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *program, *words], env=env, cwd=REPO, **pipes)


@pytest.mark.distributed
def test_a_rank_that_does_not_come(free_port):
    """The first one says who, all of them end with 1."""
    ranks = [by_hand(rank, 3, free_port, "timeout_s=15") for rank in (0, 2)]
    (first, _), (other, _) = [rank.communicate(timeout=240) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert lines(first)["rendezvous"].startswith("FAIL rank 1 did not come within 15 s; 2 of 3 are there, on ")
    assert other == ""


@pytest.mark.slow
@pytest.mark.distributed
def test_a_wrong_port(free_port):
    """One line on the console, in time."""
    rank = by_hand(1, 2, free_port, "timeout_s=2")
    out, err = rank.communicate(timeout=240)
    assert rank.returncode == 1
    assert lines(out)["rendezvous"].startswith(
        f"FAIL rank 1: rank 0 does not answer at 127.0.0.1:{free_port} within 2 s"
    )
    assert err == ""


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_that_hangs(train_yaml, free_port, monkeypatch, tmp_path):
    """The other one waits for timeout_s, and says so."""
    monkeypatch.setenv("HANGS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    worker = [str(REPO / "tests" / "doctor" / "doctor_worker.py"), str(tmp_path)]
    words = {"program": [*worker, "doctor", str(train_yaml), "timeout_s=30"]}
    first, last = [by_hand(rank, 2, free_port, **words) for rank in (0, 1)]
    try:
        out, _ = first.communicate(timeout=240)
    finally:
        last.kill()
        last.communicate()
    assert first.returncode == 1
    assert lines(out)["rendezvous"].startswith("FAIL rank 0: another process died, or did not answer for 30 s")
