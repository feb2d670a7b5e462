"""How long commands take to begin: help, config, plan; and training, from the command to its first finished step.

    python tests/benchmarks/bench_startup.py --output startup.json     # one to some minutes on two CPU cores
    python tests/benchmarks/bench_startup.py --only help               # commands whose names begin so

Wall seconds depend on who else uses the machine; processor seconds, of a command and all that it starts, hardly do. The
best of `--repeats` counts, after one that is not counted, so that files are in the page cache. Training is of a small
CLIP beside a small teacher, one step, with its checkpoint; `first step` is when the log has its row, `built` when the
models, the engine and the loader are there. `imports` are the seconds of a training's modules by package, as
`python -X importtime` has them.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import datetime
from pathlib import Path

import yaml
from output import add_output, write

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tiny

ROOT = Path(__file__).resolve().parents[2]
US = [sys.executable, "-m", "kd_accel"]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
GOALS = {"help": 0.5, "plan": 10, "train": 15}  # wall seconds on an idle machine; of train until the first step
IMPORT = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)")


def commands(config: Path) -> dict[str, list[str]]:
    large = [f"{ROOT}/configs/fastclip_kd.yaml", "samples_per_epoch=12_000_000"]
    huge = ["teacher.arch=ViT-H-14", "teacher.pretrained=laion2b_s32b_b79k", "student.projector=linear"]
    launched = ["-m", "kd_accel", "train", str(config)]
    return {
        "help": [*US, "--help"],
        "help train": [*US, "help", "train"],
        "config": [*US, "config", large[0]],
        "plan, ViT-B/32 teacher": [*US, "plan", *large],
        "plan, ViT-H/14 teacher": [*US, "plan", *large, *huge],
        "train, one process": [*US, "train", str(config)],
        "train, two processes, DDP": [*LAUNCH, f"{ROOT}/launch/ddp.yaml", *launched],
        "train, two processes, ZeRO-2": [*LAUNCH, f"{ROOT}/launch/zero2.yaml", *launched],
    }


def write_config(folder: Path) -> Path:
    config = {
        "name": "run",
        "output_dir": str(folder / "runs"),
        "data": {"shards": str(tiny.write_shards(folder / "shards")), "batch_size": 8, "num_workers": 0},
        "student": {"arch": tiny.arch(), "projector": "linear"},
        "teacher": {"path": str(tiny.write_teacher(folder / "teacher"))},
        "objective": {"terms": {"clip": {"kind": "clip"}, "feature": {"kind": "feature_mse"}}},
        "optim": {"lr": 1e-3, "steps": 1},
        "log": {"every_steps": 1},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def measure(command: list[str], run: Path) -> dict[str, float]:
    """Seconds of one command, and of a training in `run` those until its parts were there."""
    before, began = _processor_seconds(), time.time()
    ran(command)
    found = {"wall": time.time() - began, "processor": _processor_seconds() - before}
    if run.exists():
        lines = (run / "out.log").read_text().splitlines()
        first = next(line for line in lines if "| step 1/" in line)
        found |= {"built": _written(lines[0]) - began, "first step": _written(first) - began}
        shutil.rmtree(run)
    return found


def ran(command: list[str]) -> str:
    """What it says on stderr; ends this program where it fails."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, check=False, text=True, capture_output=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return done.stderr


def imports() -> dict[str, float]:
    """Seconds of the ten packages that take most, and of all together."""
    said = IMPORT.findall(ran([sys.executable, "-X", "importtime", "-c", "import kd_accel.train"]))
    taken = Counter()
    for microseconds, module in said:
        taken[module.partition(".")[0]] += int(microseconds) / 1e6
    return {"all": taken.total(), **dict(taken.most_common(10))}


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _written(line: str) -> float:
    return datetime.strptime(line.partition(" | ")[0], "%Y-%m-%d %H:%M:%S,%f").timestamp()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", default="", help="commands whose names begin so")
    add_output(parser)
    options = parser.parse_args()
    best = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, command in commands(write_config(Path(folder))).items():
            if name.startswith(options.only):
                runs = [measure(command, Path(folder) / "runs/run") for _ in range(options.repeats + 1)][1:]
                best[name] = {part: min(found[part] for found in runs) for part in runs[0]}
                print(f"{name:30}" + "".join(f"{part:>12} {s:6.2f}" for part, s in best[name].items()), flush=True)
    print("goals: " + ", ".join(f"{name} {seconds} s" for name, seconds in GOALS.items()))
    taken = imports()
    print("imports of train: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in taken.items()))
    write(options.output, {"seconds": best, "imports": taken})


if __name__ == "__main__":
    main()
