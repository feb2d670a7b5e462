"""Where a run's numbers go: metrics.jsonl, out.log, the console and every tracker that Accelerate knows by name.

    metrics = MetricsLog(run_dir, config, accelerator=accelerator, total_steps=1000, start_step=0)
    metrics.log({"step": 10, "loss": 2.31, "lr": 1e-3, "samples_per_second": 812.0, ...})
    metrics.close()

Only the main rank writes; the other ranks make the same calls, and put their number before what they warn of.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from kd_accel.config import TrainConfig
from kd_accel.distributed import is_main, rank
from kd_accel.logs import LOG, start_logging, start_logging_of
from kd_accel.schema import ConfigError, flat
from kd_accel.text_files import LineFile, read_rows, replace_text, to_json

if TYPE_CHECKING:
    from accelerate import Accelerator


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
        self._file.write(to_json(row))
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


def drop_rows_after(path: Path, step: int) -> None:
    """Keep the rows of `path` up to `step`, in one atomic replacement: a resumed run writes the later ones again."""
    if not path.exists():
        return
    kept = [row for row in read_rows(path) if row["step"] <= step]
    replace_text(path, "".join(to_json(row) + "\n" for row in kept))


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
