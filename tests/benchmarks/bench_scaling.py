"""Weak scaling from one process to two, and whether two learn what one does.

    python tests/benchmarks/bench_scaling.py --output scaling.json             # ../shared/data/pairs/train; minutes
    python tests/benchmarks/bench_scaling.py --shards SHARDS --batch 128 --repeats 5

`kd-accel bench` of a small ViT student beside its teacher: one process with b rows against two processes with b rows
each, one thread per process, in turn. Efficiency is a step of one over a step of two, each in units of its own
teacher's forward pass, which exchanges nothing: so a machine whose clock drifts between two runs, by a third on shared
ones, says the same. The median of `--repeats` counts. Beside it the best samples/s, with the machine's load, and those
of two processes side by side that never talk. Then ten steps on the same samples in fp32, once with 2 b rows in one
process and once with b in each of two: the losses, side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from distilling import add_shards, link_shards, write_config
from output import add_output, write

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tiny

from kd_accel.text_files import read_rows

ROOT = Path(__file__).resolve().parents[2]
GOAL = 0.9
TEXT = {"context_length": 32, "vocab_size": 49408}
TEACHER = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 256, "layers": 6, "head_width": 64},
    "text_cfg": {**TEXT, "width": 192, "heads": 3, "layers": 4},
}
STUDENT = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 192, "layers": 6, "head_width": 64},
    "text_cfg": {**TEXT, "width": 128, "heads": 2, "layers": 4},
}
ENGINES = {"DDP": "ddp", "ZeRO-2": "zero2"}


def config_of(folder: Path, options: argparse.Namespace) -> Path:
    """A training beside its teacher, both small."""
    shards = link_shards(options.shards, folder / "shards")
    teacher = {"path": str(tiny.write_teacher(folder / "teacher", TEACHER))}
    sizes = {"batch": options.batch, "num_workers": 0, "steps": options.steps}
    return write_config(folder, shards=shards, student=STUDENT, teacher=teacher, **sizes)


def ran(launcher: str | None, *words: str | Path) -> None:
    """One verb, in one process or by a launch file in two; ends this program where it fails."""
    launch = (
        [] if launcher is None else ["-m", "accelerate.commands.launch", "--config_file", f"launch/{launcher}.yaml"]
    )
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, *launch, "-m", "kd_accel", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=env, check=False, text=True, capture_output=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


def bench(launcher: str | None, config: Path, given: str, options: argparse.Namespace, out: str = "bench") -> dict:
    """What `kd-accel bench` found."""
    words = [f"input={given}", f"measured={options.measured}", f"output_dir={config.with_name(out)}"]
    out = config.with_name(f"{out}.json")
    ran(launcher, "bench", config, *words, f"output={out}")
    return json.loads(out.read_text())


def bench_apart(config: Path, given: str, options: argparse.Namespace) -> list[dict]:
    """Of two processes side by side that never talk: what the machine gives to two."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda out: bench(None, config, given, options, out), ("first", "second")))


def speed(*found: dict) -> float:
    """Samples per second, all together."""
    return sum(one["samples_per_second"] for one in found)


def in_teachers(found: dict) -> float:
    """A step's time over that of the teacher's forward pass in it."""
    return found["step_seconds"] / found["seconds"]["teacher"]


def losses(launcher: str | None, config: Path, rows: int) -> list[float]:
    """Of the first steps of a training with `rows` per process."""
    ran(launcher, "train", config, f"data.batch_size={rows}")
    found = [row["loss"] for row in read_rows(config.parent / "runs/run/metrics.jsonl")]
    shutil.rmtree(config.parent / "runs")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shards(parser)
    parser.add_argument("--batch", type=int, default=64, help="of a process")
    parser.add_argument("--measured", type=int, default=10, help="steps of a bench")
    parser.add_argument("--steps", type=int, default=10, help="of which losses are compared")
    parser.add_argument("--repeats", type=int, default=3)
    add_output(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(Path(folder), options)
        alone = losses(None, config, 2 * options.batch)
        found: dict = {"losses": {"one process": alone, "apart": {}}}
        for engine, launcher in ENGINES.items():
            found["losses"][engine] = both = losses(launcher, config, options.batch)
            apart = max(abs(a - b) / abs(a) for a, b in zip(alone, both, strict=True))
            found["losses"]["apart"][engine] = apart
            print(f"{engine}: losses of {len(alone)} steps differ from one process by {apart:.1e} at most", flush=True)
        for given in ("synthetic", "data"):
            two_apart, runs = [], {name: [] for name in ("one process", *ENGINES)}
            for _ in range(options.repeats):
                two_apart.append(speed(*bench_apart(config, given, options)))
                for name, taken in runs.items():
                    taken.append(bench(ENGINES.get(name), config, given, options))
            best = {name: max(map(speed, taken)) for name, taken in runs.items()}
            twice = 2 * best["one process"]
            print(f"input={given}: two processes apart {max(two_apart) / twice:.2f} of twice one", flush=True)
            for name in ENGINES:
                pairs = zip(runs["one process"], runs[name], strict=True)
                efficiency = median(in_teachers(one) / in_teachers(two) for one, two in pairs)
                found[f"{name}, input={given}"] = {
                    "efficiency": efficiency,
                    "samples_per_second": best[name],
                    "speedup": best[name] / best["one process"],
                }
                print(
                    f"input={given}, {name}: efficiency {efficiency:.2f} (goal {GOAL}); {best['one process']:.1f} ->"
                    f" {best[name]:.1f} samples/s, {best[name] / twice:.2f} of twice, {best[name] / max(two_apart):.2f}"
                    f" of two apart (load {os.getloadavg()[0]:.1f})",
                    flush=True,
                )
    write(options.output, found)


if __name__ == "__main__":
    main()
