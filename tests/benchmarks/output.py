"""What the benchmarks share: `--output FILE`, numbers as JSON for compare.py; `--device`; and bytes that are held."""

from __future__ import annotations

import argparse
import json
import resource
from pathlib import Path

import torch

from kd_accel.text_files import replace_text


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, help="where the numbers go as JSON")


def add_device(parser: argparse.ArgumentParser) -> None:
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=found)


def write(file: Path | None, figures: dict) -> None:
    """Nested by case; the last name says what a number is and its unit: `seconds`, `peak_bytes`, `..._per_second`."""
    if file is not None:
        replace_text(file, json.dumps(figures, indent=1) + "\n")


def peak_bytes() -> int:
    """The most that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Peak:
    """Bytes held at most since this was made, above what was held then: by the process, or on the GPU."""

    def __init__(self, device: str):
        self.device, self.start = device, held(device)
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is the present use again

    def above(self, start: int | None = None) -> int:
        """Above `start`, or what was held when this was made."""
        most = torch.cuda.max_memory_allocated() if self.device == "cuda" else _status("VmHWM")
        return most - (self.start if start is None else start)


def held(device: str) -> int:
    """Bytes of this process, or of its tensors on the GPU."""
    return torch.cuda.memory_allocated() if device == "cuda" else _status("VmRSS")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
