"""What one process sees by itself, before it talks to any other: versions, devices, the launcher's settings."""

from __future__ import annotations

import os
import platform
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from kd_accel import __version__
from kd_accel.config import TrainConfig
from kd_accel.doctor.findings import Finding, checked
from kd_accel.schema import ConfigError

SHOWN = ("torch", "accelerate", "deepspeed", "transformers", "open_clip_torch")
MOSTLY = 0.9  # of a GPU's memory; its driver and this process take some


def findings(config: TrainConfig | None) -> list[Finding]:
    """Versions, devices, memory for loader workers, what the launcher's variables would do."""
    found = [*checked("versions", check_versions), *checked("devices", describe_devices)]
    if config is not None:
        found += [*precision_remarks(config), *shared_memory_remarks(config)]
    return [*found, *launcher_remarks(config)]


def check_versions() -> str:
    """Installed packages against what this package asks for. Raises ConfigError, a line for each that does not fit."""
    if wrong := [line for pin in pins() for line in _unfit(pin)]:
        raise ConfigError("\n".join(wrong))
    shown = ", ".join(f"{name} {version(name)}" for name in SHOWN)
    return f"kd_accel {__version__}, Python {platform.python_version()}, {shown}"


def pins() -> list[Requirement]:
    """What this package asks for: that of the checkout that runs, else that of the installation."""
    file = Path(__file__).parents[2] / "pyproject.toml"
    if file.is_file():
        lines = tomllib.loads(file.read_text())["project"]["dependencies"]
    else:
        lines = requires("kd-accel")
    return [pin for pin in map(Requirement, lines) if pin.marker is None]  # extras have markers


def _unfit(pin: Requirement) -> Iterator[str]:
    try:
        installed = version(pin.name)
    except PackageNotFoundError:
        installed = None
    if installed is None or not pin.specifier.contains(installed, prereleases=True):
        what = "not installed" if installed is None else f"{installed} is installed"
        yield f'{pin.name}: {what}, {pin.specifier or "some version"} is needed: pip install "{pin}"'


def describe_devices() -> str | Finding:
    """This process's device. Raises ConfigError for a machine with more processes than GPUs."""
    if not torch.cuda.is_available():
        return f"CPU, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads per process"
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if processes > gpus:
        raise ConfigError(
            f"{processes} processes on a machine with {gpus} GPU{'s' * (gpus > 1)}: NCCL needs one for each; lower"
            " num_processes, or look at CUDA_VISIBLE_DEVICES"
        )
    device = int(os.environ.get("LOCAL_RANK", "0"))
    free, total = torch.cuda.mem_get_info(device)
    said = f"{torch.cuda.get_device_name(device)}, {total / 2**30:.0f} GiB"
    if free > MOSTLY * total:
        return said
    taken = f"{(total - free) / 2**30:.0f} GiB are taken: look for other programs with nvidia-smi"
    return Finding("warn", "devices", f"{said}, of which {taken}")


def precision_remarks(config: TrainConfig) -> list[Finding]:
    """Where bf16 is slower than fp32."""
    if config.precision == "fp32":
        return []
    if torch.cuda.is_available():
        fast, device = torch.cuda.is_bf16_supported(including_emulation=False), "this GPU"
    else:
        fast, device = "amx_bf16" in Path("/proc/cpuinfo").read_text(), "this processor"
    if fast:
        return [Finding("ok", "precision", f"bf16, for which {device} has matrix units")]
    said = f"{device} has no matrix units for bf16, which is then slower than fp32: set precision=fp32"
    return [Finding("warn", "precision", said)]


def shared_memory_remarks(config: TrainConfig, folder: Path = Path("/dev/shm")) -> list[Finding]:
    """Where containers leave loader workers too little of it: they end with SIGBUS, in the middle of a run."""
    if not config.data.num_workers:
        return []
    room = os.statvfs(folder)
    free, least = room.f_bavail * room.f_frsize, 2**30
    if free >= least:
        return []
    said = f"{free / 2**20:.0f} MiB free in {folder}, through which loader workers pass batches: mount more, or lower"
    return [Finding("warn", "shared memory", f"{said} data.num_workers={config.data.num_workers}")]


def launcher_remarks(config: TrainConfig | None) -> list[Finding]:
    """Settings that a launcher hands over in variables, and that would be without effect, or have another one."""
    found = []
    if (backend := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()) != "no":
        said = f"dynamo_backend={backend} would wrap the engine in another one: drop it from the launch file"
        found.append(Finding("FAIL", "launcher", said))
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if config is not None and mixed not in ("no", config.precision):
        said = f"mixed_precision={mixed} has no effect, precision={config.precision} of the config decides: drop it"
        found.append(Finding("warn", "launcher", said))
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if config is not None and restarts and config.resume == "never":
        said = f"max_restarts={restarts}, but a run that is there is refused: set resume=auto"
        found.append(Finding("warn", "launcher", said))
    return found
