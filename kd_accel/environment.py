"""What a run ran on, in environment.json: versions, hardware, commit."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from kd_accel.distributed import is_main, world_size
from kd_accel.text_files import replace_text

PACKAGES = ("kd_accel", "torch", "accelerate", "deepspeed", "transformers", "open_clip_torch", "webdataset", "numpy")


def write_environment(run_dir: Path) -> None:
    """Write environment.json: versions, hardware and commit, to explain a number later; nothing that names a person."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    environment = {
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "cuda_devices": devices,
        "world_size": world_size(),
        "commit": _commit(),
    }
    if is_main():
        run_dir.mkdir(parents=True, exist_ok=True)
        replace_text(run_dir / "environment.json", json.dumps(environment, indent=2) + "\n")


def installed(package: str) -> str | None:
    """Its version, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit that kd_accel runs from, with "+" when files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=False)

    head = git("rev-parse", "HEAD")
    if head.returncode:  # no commit yet, or a checkout of another owner, which git refuses to read
        return None
    return head.stdout.strip() + ("+" if git("status", "--porcelain", "--untracked-files=no").stdout else "")
