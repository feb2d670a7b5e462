"""What a process sees by itself."""

from __future__ import annotations

from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch

from kd_accel.doctor import environment
from kd_accel.schema import ConfigError


def test_the_installed_packages_fit():
    """Those that the tests run with."""
    said = environment.check_versions()
    assert f"torch {version('torch')}" in said
    assert f"deepspeed {version('deepspeed')}" in said


def test_pins_are_those_of_the_checkout():
    """accelerate is held to the releases whose behaviour launch.py knows."""
    pins = {pin.name: pin for pin in environment.pins()}
    assert "1.15.0" in pins["accelerate"].specifier
    assert "1.16.0" not in pins["accelerate"].specifier
    assert "tensorboard" not in pins


def test_another_version_is_a_failure_with_its_remedy(monkeypatch):
    found = {"deepspeed": "0.19.7"}
    monkeypatch.setattr(environment, "version", lambda name: found.get(name) or version(name))
    with pytest.raises(ConfigError) as caught:
        environment.check_versions()
    (line,) = str(caught.value).splitlines()
    assert line.startswith("deepspeed: 0.19.7 is installed, ")
    assert 'pip install "deepspeed' in line


def test_a_missing_package(monkeypatch):
    def all_but_one(name):
        if name == "webdataset":
            raise environment.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(environment, "version", all_but_one)
    with pytest.raises(ConfigError, match="^webdataset: not installed, .* is needed: pip install"):
        environment.check_versions()


@pytest.fixture
def one_gpu(monkeypatch):
    """A function: a machine with one GPU of 80 GiB, so many of them free, and so many processes."""

    def pretend(*, free: int, processes: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * 2**30, 80 * 2**30))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        monkeypatch.setenv("LOCAL_RANK", "0")

    return pretend


def test_more_processes_than_gpus(one_gpu):
    """NCCL would wait for ever."""
    one_gpu(free=80, processes=2)
    with pytest.raises(ConfigError, match="2 processes on a machine with 1 GPU: .*num_processes"):
        environment.describe_devices()


def test_a_gpu_that_somebody_uses(one_gpu):
    one_gpu(free=79, processes=1)
    assert environment.describe_devices() == "H100, 80 GiB"
    one_gpu(free=20, processes=1)
    found = environment.describe_devices()
    assert found.status == "warn"
    assert "60 GiB are taken" in found.said


def test_bf16_without_matrix_units(changed, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text("flags: fpu avx2")
    monkeypatch.setattr(environment, "Path", lambda _: tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (found,) = environment.precision_remarks(changed("precision=bf16"))
    assert found.status == "warn"
    assert "set precision=fp32" in found.said
    assert environment.precision_remarks(changed()) == []


def test_little_shared_memory(changed, monkeypatch):
    """Docker gives 64 MiB."""
    monkeypatch.setattr(environment.os, "statvfs", lambda _: SimpleNamespace(f_bavail=2**14, f_frsize=2**12))
    (found,) = environment.shared_memory_remarks(changed())
    assert found.status == "warn"
    assert "64 MiB free in /dev/shm" in found.said
    assert environment.shared_memory_remarks(changed("data.num_workers=0")) == []


@pytest.mark.parametrize(
    ("variable", "value", "status", "said"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "FAIL", "dynamo_backend=inductor"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "warn", "mixed_precision=fp16 has no effect, precision=fp32"),
        ("TORCHELASTIC_MAX_RESTARTS", "3", "warn", "max_restarts=3, but a run that is there is refused"),
    ],
)
def test_what_a_launcher_sets(changed, monkeypatch, variable, value, status, said):
    monkeypatch.setenv(variable, value)
    (found,) = environment.launcher_remarks(changed())
    assert found.status == status
    assert said in found.said


def test_a_launcher_that_sets_nothing_of_that(changed, monkeypatch):
    """As ours; bf16 and resume=auto fit what the launcher says."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert environment.launcher_remarks(changed("precision=bf16", "resume=auto")) == []
