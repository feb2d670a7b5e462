"""The runs of the demo: each is trained in processes of its own, evaluated, and its rows read again."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from contextlib import redirect_stdout
from itertools import takewhile
from pathlib import Path

from kd_accel.eval_config import EvalConfig
from kd_accel.evals import suite
from kd_accel.models.release_folder import resolve_release, run_and_step
from kd_accel.schema import ConfigError
from kd_accel.text_files import read_rows

ROOT = Path(__file__).resolve().parents[2]  # of the checkout
TAIL = 20  # lines of a failed run that are shown


def train(folder: Path, config: str, *overrides: str, name: str, seed: int) -> Path:
    """Launch two processes with ZeRO-2 on the CPU; returns the run directory. A finished run ends at once.

    Raises ConfigError when it fails, with the end of its log.
    """
    values = [f"data.shards={folder / 'data' / 'train'}", f"output_dir={folder}", f"name={name}", f"seed={seed}"]
    words = ["train", str(_shipped("configs", config)), *values, *overrides, "resume=auto"]
    launch = ["--config_file", str(_shipped("launch", "zero2.yaml")), "--num_processes=2", "--main_process_port=0"]
    print(f"$ accelerate launch {' '.join(launch)} -m kd_accel {' '.join(words)}", flush=True)
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, "-m", "kd_accel", *words]
    _launch(command, log=folder / "logs" / f"{name}.log")
    return folder / name


def _shipped(*parts: str) -> Path:
    """A file of the checkout that kd_accel runs from."""
    path = ROOT.joinpath(*parts)
    if not path.exists():
        raise ConfigError(f"demo needs {'/'.join(parts)} of the repository: run it from a checkout (pip install -e .)")
    return path


def _launch(command: list[str], *, log: Path) -> None:
    """Run `command` with everything it prints in `log`; our own lines are shown. Raises ConfigError when it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    # Two processes on two cores: one thread each, or they fight. GPUs are hidden: the demo's numbers are for the CPU.
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with log.open("w", encoding="utf-8") as file, subprocess.Popen(command, env=environment, **output) as process:
        for line in process.stdout:
            file.write(line)
            if " | INFO | " in line or " | WARNING | " in line:
                print(f"  {line.rstrip()}", flush=True)
    if process.returncode:
        said = "\n".join(_last_words(log.read_text(encoding="utf-8", errors="replace").splitlines()))
        raise ConfigError(f"{said}\ndemo: a run failed (exit code {process.returncode}); all that it said is in {log}")


def _last_words(lines: list[str]) -> list[str]:
    """What went wrong: our own error lines, else the end of what came before the launcher's summary of exit codes."""
    said = list(takewhile(lambda line: "torch/distributed/elastic" not in line, lines))
    return [line.removeprefix("error: ") for line in said if line.startswith("error: ")] or said[-TAIL:]


def evaluate(run: Path, data: Path) -> None:
    """Append to the run's results.jsonl, unless its newest checkpoint is there already."""
    _, step = run_and_step(resolve_release(str(run)))
    print(f"  {run.name}", flush=True)
    done = {row["dataset"] for row in results(run) if row["step"] == step}
    if done != {folder.name for folder in data.iterdir()}:
        with (run / "out.log").open("a", encoding="utf-8") as log, redirect_stdout(log):  # its tables would bury ours
            suite.run(EvalConfig(model=str(run), data=str(data), num_workers=0))


def results(run: Path) -> list[dict]:
    """Rows of its results.jsonl, in the order in which they were written."""
    path = run / "results.jsonl"
    return read_rows(path) if path.exists() else []


def speed(run: Path) -> float:
    """Samples per second of all processes, the median over the logged rows: the first one contains the start-up."""
    return statistics.median(row["samples_per_second"] for row in read_rows(run / "metrics.jsonl"))
