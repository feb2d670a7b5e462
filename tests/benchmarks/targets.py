"""Every figure that has a target, in one run: what was asked, and what is seen.

    python tests/benchmarks/targets.py runs/targets                 # ../shared/data/pairs; an hour on two CPU cores
    python tests/benchmarks/targets.py runs/targets --only store    # this part again, then the table of all

The parts are the other programs of this folder and `kd-accel bench`, one after the other, since they measure time; each
leaves FOLDER/PART.json and FOLDER/PART.log. Those whose JSON is there are not run again unless `--only` names them. The
targets of correctness (parity, kills, faults, flat memory) are tests.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path

from distilling import PAIRS

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
LAUNCH = "-m accelerate.commands.launch --config_file launch"
BENCH = (
    "-m kd_accel bench configs/small_teacher.yaml data.shards={pairs} data.batch_size=64 input=synthetic output={json}"
)

# part -> the words after `python`; {pairs} is --pairs, {json} the file of its numbers
PARTS = {
    "startup": "{here}/bench_startup.py --output {json}",
    "telemetry": "{here}/bench_telemetry.py --output {json}",
    "open_clip": "{here}/bench_open_clip.py --shards {pairs} --output {json}",
    "scaling": "{here}/bench_scaling.py --shards {pairs} --output {json}",
    "checkpoint_ddp": f"{LAUNCH}/ddp.yaml {BENCH}",
    "checkpoint_zero2": f"{LAUNCH}/zero2.yaml {BENCH}",
    "objective": "{here}/bench_objective.py --limit-gib 7 --output {json}",
    "accumulate": "{here}/bench_accumulate.py --output {json}",
    "data": "{here}/bench_data.py --pairs {pairs} --output {json}",
    "store": "{here}/bench_store.py --output {json}",
    "eval": "{here}/bench_eval.py --output {json}",
}


@dataclass(frozen=True)
class Target:
    """One line of the table.

    number, over    names on the way to a number of the part's JSON, and to the one that it is divided by
    """

    part: str
    what: str
    asked: str  # "<= 1.3" or ">= 1.3"
    number: tuple[str, ...]
    over: tuple[str, ...] | None = None

    def seen(self, found: dict) -> float:
        value = reduce(getitem, self.number, found)
        return value if self.over is None else value / reduce(getitem, self.over, found)

    def met(self, seen: float) -> bool:
        sign, limit = self.asked.split()
        return seen <= float(limit) if sign == "<=" else seen >= float(limit)


def of_objective(what: str, asked: str, rows: str, case: str, over: str, number: str) -> Target:
    """One way to compute losses over another, at one batch."""
    return Target("objective", what, asked, (rows, case, number), (rows, over, number))


KL, OPEN_CLIP = "clip + kl, chunked", "open_clip DistillClipLoss"
CHUNKED, WHOLE = "all four, chunked", "all four, unchunked"
EXACT, SEPARATE = "train.accumulate = k", "k steps"
LIVE, STORED = "kd_accel, live teacher", "kd_accel, stored teacher"
DDP, ZERO2 = "train, two processes, DDP", "train, two processes, ZeRO-2"
STALL, STEP = ("checkpoint_stall",), ("step_seconds",)
TARGETS = (
    Target("open_clip", "samples/s over open_clip's, live B/16", ">= 1.3", ("B/16", LIVE, "speedup")),
    Target("open_clip", "samples/s over open_clip's, live L/14", ">= 1.3", ("L/14", LIVE, "speedup")),
    Target("open_clip", "samples/s over open_clip's, stored L/14", ">= 2.5", ("L/14", STORED, "speedup")),
    Target("scaling", "1 -> 2 processes, DDP, random input", ">= 0.9", ("DDP, input=synthetic", "efficiency")),
    Target("scaling", "1 -> 2 processes, DDP, real input", ">= 0.9", ("DDP, input=data", "efficiency")),
    Target("scaling", "1 -> 2 processes, ZeRO-2, random input", ">= 0.9", ("ZeRO-2, input=synthetic", "efficiency")),
    Target("scaling", "1 -> 2 processes, ZeRO-2, real input", ">= 0.9", ("ZeRO-2, input=data", "efficiency")),
    Target("scaling", "losses apart from one process's, DDP", "<= 1e-5", ("losses", "apart", "DDP")),
    Target("scaling", "losses apart from one process's, ZeRO-2", "<= 1e-5", ("losses", "apart", "ZeRO-2")),
    *(
        Target(
            "objective",
            f"its memory, B = {b} over {a}",
            "<= 2.2",
            (b, CHUNKED, "peak_bytes"),
            (a, CHUNKED, "peak_bytes"),
        )
        for a, b in (("2048", "4096"), ("4096", "8192"), ("8192", "16384"))
    ),
    of_objective("time over DistillClipLoss, B = 2048", "<= 1.3", "2048", KL, OPEN_CLIP, "seconds"),
    of_objective("memory over unchunked, B = 8192", "<= 0.125", "8192", CHUNKED, WHOLE, "peak_bytes"),
    of_objective("time over unchunked, B = 8192", "<= 1.2", "8192", CHUNKED, WHOLE, "seconds"),
    Target("startup", "first step, one process, s", "<= 15", ("seconds", "train, one process", "first step")),
    Target("startup", "first step, DDP, s", "<= 15", ("seconds", DDP, "first step")),
    Target("startup", "first step, ZeRO-2, s", "<= 15", ("seconds", ZERO2, "first step")),
    Target("startup", "--help, s", "<= 0.5", ("seconds", "help", "wall")),
    Target("startup", "plan, s", "<= 10", ("seconds", "plan, ViT-B/32 teacher", "wall")),
    Target("telemetry", "split of a step, its cost", "<= 0.01", ("seconds", "marks"), ("seconds", "step")),
    Target("checkpoint_ddp", "wait for a checkpoint over a step, DDP", "<= 0.1", STALL, STEP),
    Target("checkpoint_zero2", "wait for a checkpoint over a step, ZeRO-2", "<= 0.1", STALL, STEP),
    Target("accumulate", "time of k = 8 over 8 steps", "<= 1.45", (EXACT, "seconds"), (SEPARATE, "seconds")),
    Target("accumulate", "memory of k = 8 over k = 1", "<= 1.1", (EXACT, "peak_bytes"), (SEPARATE, "peak_bytes")),
    Target("data", "input over open_clip's, pairs to 64 px", ">= 1.5", ("pairs 64 px", "ratio", "core_ratio")),
    Target("data", "input over open_clip's, 500 x 375", ">= 1.5", ("500 x 375 224 px", "ratio", "core_ratio")),
    Target("data", "input over open_clip's, 667 x 500", ">= 1.5", ("667 x 500 224 px", "ratio", "core_ratio")),
    Target("store", "step with a stored teacher over none", "<= 1.05", ("cached", "steps")),
    Target("eval", "images/s that an evaluation loses", "<= 0.15", ("overhead",)),
)


def run(part: str, folder: Path, pairs: Path) -> None:
    """One part; ends this program where it fails."""
    words = [word.format(here=HERE, json=folder / f"{part}.json", pairs=pairs) for word in PARTS[part].split()]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    print(f"{part} ...", end=" ", flush=True)
    began = time.monotonic()
    with open(folder / f"{part}.log", "w", encoding="utf-8") as log:
        done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, stdout=log, stderr=log, check=False)
    print(f"{time.monotonic() - began:.0f} s", flush=True)
    if done.returncode:
        sys.exit(f"{part} ended with {done.returncode}: see {folder / part}.log")


def table(folder: Path) -> list[str]:
    """A line for every target; a dash for what was not run."""
    lines = []
    for target in TARGETS:
        file, seen = folder / f"{target.part}.json", "-"
        if file.exists():
            value = target.seen(json.loads(file.read_text()))
            seen = f"{value:.3g}{'' if target.met(value) else '  MISSED'}"
        lines.append(f"{target.part:16} {target.what:42} {target.asked:>8}   {seen}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=Path, default=PAIRS, help="webdataset tars with .jpg and .txt")
    parser.add_argument("--only", nargs="*", choices=PARTS, help="these parts; no name: only the table")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS if options.only is None else options.only:
        if options.only is not None or not (folder / f"{part}.json").exists():
            run(part, folder, options.pairs.resolve())
    print(*table(folder), sep="\n")


if __name__ == "__main__":
    main()
