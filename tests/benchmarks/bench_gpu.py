"""What one GPU makes of a distillation step: ViT-L/14 -> ViT-B/16 and ViT-B/16 -> ViT-B/32, random weights and input.

    python tests/benchmarks/bench_gpu.py --output gpu.json                # an H200: some 20 minutes
    python tests/benchmarks/bench_gpu.py --output gpu.json --only L14 --seconds 540
    python tests/benchmarks/bench_gpu.py --output gpu.json --device cpu --tiny --most 16

A row is `kd-accel bench` in a process of its own. The largest batch that fits is doubled to and then bisected, to an
eighth of it, for the live teacher and for activation checkpointing; the other rows take the live teacher's, or less.
Rows of the objective are cases of bench_objective.py. Whatever is measured is in `--output` at once and is not measured
again, so a run that was stopped, or that stops itself after `--seconds`, goes on with the next call.

The table is gpu_table.py's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import yaml
from bench_objective import CASES
from gpu_table import best, table
from open_clip import get_model_config
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tiny

from kd_accel.text_files import replace_text

PAIRS = {"L14-B16": ("ViT-L-14", "ViT-B-16"), "B16-B32": ("ViT-B-16", "ViT-B-32")}
LIVE, CHECKPOINTING, STORED = "live teacher", "checkpointing", "stored teacher"
CHANGES = {  # row -> what it sets; LIVE comes first, because the others start from its batch
    LIVE: {},
    STORED: {"teacher": {"placement": "cached"}},
    "int8 teacher": {"teacher": {"placement": "int8"}},
    "compiled": {"train": {"compile": True}},
    CHECKPOINTING: {"student": {"grad_checkpointing": True}},
}
TERMS = {"clip": {"kind": "clip"}, "kl": {"kind": "logit_kl"}, "feature": {"kind": "feature_mse"}}
SEARCHED = (LIVE, CHECKPOINTING)
OBJECTIVE = [case for case in CASES if not case.startswith("all")]
NO_MEMORY = ("OutOfMemoryError", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")


class NoMemory(Exception):
    """A process needed more than there is."""


class NoTime(Exception):
    """`--seconds` are over, or would be before the next measurement ends."""


class Results:
    """What was measured, in a file: {"machine": ..., "rows": {row: {size or case: numbers; null: no memory}}}."""

    def __init__(self, file: Path, *, seconds: float):
        self.file, self.ends, self.longest = file, time.monotonic() + seconds, 0.0
        self.found = json.loads(file.read_text()) if file.exists() else {"rows": {}}

    def get(self, row: str, key: str, measure: Callable[[float], dict]) -> dict | None:
        """`measure(seconds left)`, unless it is there. Raises NoTime, and whatever `measure` raises but NoMemory."""
        rows = self.found["rows"]
        if key not in rows.get(row, {}):
            began = time.monotonic()
            if self.ends - began < self.longest:
                raise NoTime
            try:
                numbers = measure(self.ends - began)
            except NoMemory:
                numbers = None
            except subprocess.TimeoutExpired:
                raise NoTime from None
            self.longest = max(self.longest, time.monotonic() - began)
            rows.setdefault(row, {})[key] = numbers
            print(f"{row}, {key}: {'no memory' if numbers is None else 'measured'}", file=sys.stderr, flush=True)
            replace_text(self.file, json.dumps(self.found, indent=1) + "\n")
        return rows[row][key]


def largest(fits: Callable[[int], bool], *, start: int, most: int) -> int:
    """The largest of 1..most that fits, to an eighth of it; 0 where not even one does."""
    batch, low, high = min(start, most), 0, None
    while True:
        if fits(batch):
            low = batch
        else:
            high = batch
        if low == most or (high is not None and high - low <= max(1, low // 8)):
            return low
        batch = min(2 * low, most) if high is None else (low + high) // 2


def child(words: list[str], *, device: str, seconds: float) -> str:
    """What it prints. Raises NoMemory, RuntimeError with its last line, TimeoutExpired."""
    env = {**os.environ} if device == "cuda" else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *words]
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True, timeout=seconds)
    if done.returncode == 0:
        return done.stdout
    if any(sign in done.stderr for sign in NO_MEMORY):
        raise NoMemory
    raise RuntimeError((done.stderr.strip() or f"ended with {done.returncode}").splitlines()[-1])


class Pair:
    """A teacher with random weights, the store of its features, and the configs that train a student beside it."""

    def __init__(self, name: str, folder: Path, options: argparse.Namespace):
        self.folder, self.options = folder / name, options
        names = ("tiny teacher", "tiny student") if options.tiny else PAIRS[name]
        self.teacher, self.student = (_model_config(name) for name in names)

    def measure(self, change: str, batch: int, seconds: float) -> dict:
        """The numbers of `kd-accel bench`, or what `child` raises."""
        ends, output = time.monotonic() + seconds, self.folder / "bench.json"
        self._make_files(ends, stored=change == STORED)
        words = ["input=synthetic", f"data.batch_size={batch}", f"output={output}"]
        words += [f"warmup={self.options.warmup}", f"measured={self.options.measured}"]
        self._run(["bench", self._config(change), *words], ends)
        return json.loads(output.read_text())

    def _make_files(self, ends: float, *, stored: bool) -> None:
        if not self.folder.exists():
            tiny.write_teacher(self.folder / "teacher", self.teacher)
            tiny.write_shards(self.folder / "shards", shards=1)
        if stored and not (self.folder / "store" / "store.json").exists():
            self._run(["embed", self._config(LIVE), f"out={self.folder}/store"], ends)

    def _config(self, change: str) -> str:
        """A file: the common values, and those of `change` in place of theirs."""
        teacher = {"store": f"{self.folder}/store"} if change == STORED else {"path": f"{self.folder}/teacher"}
        values = {
            "name": "run",
            "output_dir": f"{self.folder}/runs",
            "precision": "bf16" if self.options.device == "cuda" else "fp32",
            "data": {"shards": f"{self.folder}/shards", "batch_size": 8, "num_workers": 0},
            "student": {"arch": self.student, "projector": "linear"},
            "teacher": teacher,
            "objective": {"terms": TERMS},
            "optim": {"lr": 1e-4, "steps": 1},
        }
        for section, keys in CHANGES[change].items():
            values[section] = values.get(section, {}) | keys
        file = self.folder / f"{change.replace(' ', '_')}.yaml"
        file.write_text(yaml.safe_dump(values))
        return str(file)

    def _run(self, words: list[str], ends: float) -> None:
        child(["-m", "kd_accel", *words], device=self.options.device, seconds=ends - time.monotonic())


def _model_config(name: str) -> dict:
    if name.startswith("tiny"):
        return tiny.arch(*((48, 24) if name == "tiny teacher" else (32, 16)))
    return get_model_config(name)


def objective(case: str, rows: int, device: str, seconds: float) -> dict:
    """{peak_bytes, seconds} of a step of the losses alone."""
    script = str(Path(__file__).with_name("bench_objective.py"))
    words = [script, "--case", case, "--rows", str(rows), "--device", device]
    return json.loads(child(words, device=device, seconds=seconds).splitlines()[-1])


def ceiling(device: str, sizes: tuple[int, ...]) -> dict[str, float]:
    """FLOP/s of square products by their size, each for a second; bf16, on a CPU fp32."""
    found = {}
    for size in sizes:
        one, other = (torch.randn(size, size, device=device) for _ in range(2))
        if device == "cuda":
            one, other = one.bfloat16(), other.bfloat16()
        timer = Timer("one @ other", globals={"one": one, "other": other}, num_threads=torch.get_num_threads())
        found[str(size)] = 2 * size**3 / timer.blocked_autorange(min_run_time=1).median
    return found


def machine(device: str, small: bool) -> dict:
    """What the figures are of, and its ceiling."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flops_by_size": ceiling(device, (512, 1024) if small else (4096, 8192, 16384)),
    }


def in_child(function: Callable, *arguments):
    """Its value, from a process that ends and leaves the GPU's memory free."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure_all(results: Results, folder: Path, options: argparse.Namespace) -> list[str]:
    """Every row of `--only`; the errors, by row. Raises NoTime."""
    if "machine" not in results.found:
        results.found["machine"] = in_child(machine, options.device, options.tiny)
    errors = []
    for row, measure in _jobs(results, folder, options):
        if not options.only or any(part in row for part in options.only):
            try:
                measure()
            except RuntimeError as error:
                errors.append(f"{row}: {error}")
    return errors


def _jobs(results: Results, folder: Path, options: argparse.Namespace) -> list[tuple[str, Callable[[], object]]]:
    jobs = []
    for name in PAIRS:
        pair = Pair(name, folder, options)
        jobs += [(f"{name} {change}", partial(_search, results, pair, name, change, options)) for change in CHANGES]
    for rows in options.rows:
        for case in OBJECTIVE:
            measure = partial(objective, case, rows, options.device)
            jobs.append((f"objective {rows}", partial(results.get, f"objective {rows}", case, measure)))
    return jobs


def _search(results: Results, pair: Pair, name: str, change: str, options: argparse.Namespace) -> None:
    live = None if change == LIVE else best(results.found["rows"].get(f"{name} {LIVE}", {}))
    start = live["global_batch"] if live else options.start

    def fits(batch: int) -> bool:
        return results.get(f"{name} {change}", str(batch), partial(pair.measure, change, batch)) is not None

    largest(fits, start=start, most=options.most if change in SEARCHED else start)


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="json; what is in it is not measured again")
    parser.add_argument("--only", nargs="+", metavar="PART", help="rows whose name has one of these in it")
    parser.add_argument("--seconds", type=float, default=86400.0, help="stop before they are over")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny towers, to try the script")
    parser.add_argument("--start", type=int, default=256, help="the batch that is tried first")
    parser.add_argument("--most", type=int, default=2**16, help="the largest batch that is tried")
    parser.add_argument("--warmup", type=int, default=3, help="steps")
    parser.add_argument("--measured", type=int, default=10, help="steps")
    parser.add_argument("--rows", type=int, nargs="+", default=[16384, 65536], help="of the objective")
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    options = parse(words)
    results, errors = Results(options.output, seconds=options.seconds), []
    with tempfile.TemporaryDirectory() as folder:
        try:
            errors = measure_all(results, Path(folder), options)
        except NoTime:
            errors = [f"{options.seconds:.0f} seconds are over: the same command goes on"]
    print("\n".join([table(results.found, LIVE), *errors]))
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
