"""Where a run's numbers go: metrics.jsonl, out.log, the console and every tracker that Accelerate knows by name.

    metrics = MetricsLog(run_dir, config, accelerator=accelerator, total_steps=1000, start_step=0)
    metrics.log({"step": 10, "loss": 2.31, "lr": 1e-3, "samples_per_second": 812.0, ...})
    metrics.close()

Only the main rank writes; the other ranks make the same calls, and put their number before what they warn of.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from kd_accel.config import TrainConfig
from kd_accel.distributed import is_main, rank, world_size
from kd_accel.logs import LOG, LineFile, start_logging, start_logging_of
from kd_accel.schema import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator

PACKAGES = ("kd_accel", "torch", "accelerate", "deepspeed", "transformers", "open_clip_torch", "webdataset", "numpy")


class MetricsLog:
    """One row of numbers per logged step, to every place at once."""

    run_dir: Path
    total_steps: int
    _file: LineFile | None  # metrics.jsonl; None on ranks other than the main one
    _bar: tqdm | None  # on the main one's terminal only
    _handlers: list[logging.Handler]  # of the logger "kd_accel": out.log and the console, of other ranks the latter
    _accelerator: Accelerator | None  # None without trackers

    def __init__(
        self,
        run_dir: Path,
        config: TrainConfig,
        *,
        accelerator: Accelerator | None = None,
        total_steps: int,
        start_step: int = 0,
    ):
        """Open the outputs of `run_dir`; rows of an earlier attempt beyond `start_step` are dropped.

        Raises ConfigError, on every rank, for a tracker that Accelerate does not know or that is not installed.
        """
        self.run_dir, self.total_steps = run_dir, total_steps
        check_trackers(config.log.trackers)
        self._accelerator = accelerator if config.log.trackers else None
        if config.log.trackers:
            assert accelerator is not None, "trackers are started by the accelerator"
            _start_trackers(accelerator, run_dir, config)
        self._file, self._bar, self._handlers = None, None, []
        if is_main():
            self._open(start_step)
        else:
            self._handlers = [start_logging_of(rank())]

    def _open(self, start_step: int) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / "metrics.jsonl"
        drop_rows_after(path, start_step)
        self._file = LineFile(path)
        terminal = sys.stderr.isatty()
        self._handlers = start_logging(self.run_dir / "out.log", rows_on_console=not terminal)
        if terminal:
            self._bar = tqdm(total=self.total_steps, initial=start_step, unit="step", dynamic_ncols=True)

    def log(self, row: dict[str, float]) -> None:
        """Write one row; `step` is needed, and `loss`, `lr`, `samples_per_second` are shown beside the progress bar."""
        if self._accelerator is not None:
            values = {key: value for key, value in row.items() if key != "step"}
            self._accelerator.log(values, step=int(row["step"]))
        if self._file is None:
            return
        self._file.write(_to_json(row))
        LOG.info(_line(row, self.total_steps), extra={"is_row": True})
        if self._bar is not None:
            shown = {key: f"{row[key]:.4g}" for key in ("loss", "lr", "samples_per_second") if key in row}
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(int(row["step"]) - self._bar.n)

    def close(self) -> None:
        """Flush and close everything; the run's log handlers leave the logger."""
        if self._accelerator is not None:
            for tracker in self._accelerator.trackers:
                tracker.finish()
        if self._bar is not None:
            self._bar.close()
        if self._file is not None:
            self._file.close()
        for handler in self._handlers:
            LOG.removeHandler(handler)
            handler.close()
        self._file, self._bar, self._handlers = None, None, []


class Throughput:
    """Samples per second and the share of time spent waiting for data, since the last row.

    Reads the wall clock only: it never waits for the device, so over one step the numbers lag, over a row they do not.
    """

    def __init__(self):
        self._since, self._samples, self._waited = time.perf_counter(), 0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside this block counts as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def add(self, samples: int) -> None:
        """Count the samples of one step, over all ranks."""
        self._samples += samples

    def take(self) -> dict[str, float]:
        """`samples_per_second` and `data_wait` (0..1) since the last call, then start anew."""
        seconds = max(time.perf_counter() - self._since, 1e-9)
        row = {"samples_per_second": self._samples / seconds, "data_wait": self._waited / seconds}
        self.__init__()
        return row


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file, oldest first; a last line that was cut off while being written is left out.

    Raises ConfigError for any other line that is not a JSON object.
    """
    rows = []
    lines = path.read_text(encoding="utf-8").split("\n")  # whole lines end in \n, so the last element is "" or torn
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise ConfigError(f"{path}, line {number}: not a JSON object; repair or delete this line")
        rows.append(row)
    return rows


def drop_rows_after(path: Path, step: int) -> None:
    """Keep the rows of `path` up to `step`, in one atomic replacement: a resumed run writes the later ones again."""
    if not path.exists():
        return
    kept = [row for row in read_rows(path) if row["step"] <= step]
    replace_text(path, "".join(_to_json(row) + "\n" for row in kept))


def replace_text(path: Path, text: str) -> None:
    """Write `path` so that a reader, or a crash, sees the old text or the new one and nothing between."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


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


def _to_json(row: dict[str, Any]) -> str:
    """One line of strict JSON: NaN and infinity, which JSON lacks, become null."""
    return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()})


def _line(row: dict[str, float], total_steps: int) -> str:
    """A row as a person reads it: step first, then the numbers in the order given."""
    parts = [f"step {int(row['step'])}/{total_steps}"]
    for key, value in row.items():
        match key:
            case "step" | "samples":
                continue
            case "skipped" | "bad_samples" if not value:
                continue
            case _ if key.startswith("seconds/"):  # of the last step alone; for metrics.jsonl and trackers
                continue
            case "samples_per_second":
                parts.append(f"{value:.0f} samples/s")
            case "data_wait":
                parts.append(f"waiting for data {value:.0%}")
            case _:
                parts.append(f"{key} {value:.4g}")
    return " | ".join(parts)


def check_trackers(names: list[str]) -> None:
    """Raise ConfigError for a tracker that is unknown to Accelerate or whose package is missing."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise ConfigError(f"log.trackers: unknown tracker '{name}'; Accelerate knows {known}")
        if name not in available:
            what = "'kd_accel[track]'" if name in ("tensorboard", "wandb") else name
            raise ConfigError(f"log.trackers: '{name}' is not installed: pip install {what}, or drop it from the list")


def _start_trackers(accelerator: Accelerator, run_dir: Path, config: TrainConfig) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    options = {"wandb": {"name": config.name, "dir": str(run_dir)}}
    trackers = []
    for name in dict.fromkeys(config.log.trackers):
        kind = LOGGER_TYPE_TO_CLASS[name]
        folder = [str(run_dir)] if kind.requires_logging_directory else []
        # TensorBoard has no projects: its name is the folder inside the run directory
        project = "tensorboard" if name == "tensorboard" else "kd_accel"
        trackers.append(kind(project, *folder, **options.get(name, {})))
    accelerator.log_with = trackers
    accelerator.init_trackers("kd_accel", config=flat(config.model_dump(mode="json")))


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, str | int | float | bool | None]:
    """Nested mappings as one with dotted keys: {"optim": {"lr": 1}} -> {"optim.lr": 1}; lists become text."""
    result = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = str(value) if isinstance(value, dict | list) else value
    return result
