"""Training samples per second beside open_clip's own trainer with --distill-model: same models, batch, data, processes.

    python tests/benchmarks/bench_open_clip.py                        # two CPU processes, fp32; some ten minutes
    python tests/benchmarks/bench_open_clip.py --repeats 1 --steps 10

open_clip's trainer is `open_clip_train` of the installed open_clip_torch (3.3.0 when this was written); it needs pandas
(pip install "open_clip_torch[training]") and is run by torchrun as its README has it: --local-loss --gather-with-grad,
webdataset tars, one loader process per training process, no evaluation. Here: DDP, `clip` and `logit_kl`, which are
open_clip's two losses; live teacher; then the teacher's features from a store. The models are a ViT-L/14 beside a
ViT-B/32 with every width scaled down for a CPU. A speed is the median over steps of all processes, the first steps left
out; runs alternate, and the best of the repeats counts, because the machine may be shared.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import open_clip
import torch
import yaml
from safetensors.torch import save_file

from kd_accel.data.index import build_index, expand_shards
from kd_accel.metrics import read_rows

TEXT = {"context_length": 32, "vocab_size": 49408}
# 65 and 17 tokens of a picture, as L/14 and B/32 have 257 and 50; twice the depth, a third more width
TEACHER = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 256, "layers": 12, "head_width": 64},
    "text_cfg": {**TEXT, "width": 192, "heads": 3, "layers": 6},
}
STUDENT = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 192, "layers": 6, "head_width": 64},
    "text_cfg": {**TEXT, "width": 128, "heads": 2, "layers": 6},
}
LEFT_OUT = 3  # steps at the start
SPEED = re.compile(r"([0-9.e+]+)/s, [0-9.e+]+/s/gpu")


def write_model(folder: Path, model_cfg: dict) -> None:
    """A release of random weights, which both trainers load."""
    torch.manual_seed(0)
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {}}))
    state = open_clip.CLIP(**model_cfg).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "open_clip_model.safetensors")


def link_shards(given: Path, folder: Path, number: int) -> Path:
    """The tars in a folder of our own, with an index, which kd_accel reads and open_clip does not."""
    folder.mkdir()
    for tar in sorted(given.glob("*.tar"))[:number]:
        (folder / tar.name).symlink_to(tar.resolve())
    build_index(expand_shards(str(folder)))
    return folder


def run(words: list[str], folder: Path, options: argparse.Namespace) -> str:
    """Its output."""
    threads = max(1, (os.cpu_count() or 1) // options.processes)
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "disabled"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.processes}"]
    done = subprocess.run(
        [*launcher, *words],
        cwd=folder,
        env=env,
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        sys.exit(done.stdout)
    return done.stdout


def with_open_clip(folder: Path, options: argparse.Namespace) -> float:
    shards = sorted(options.shards.glob("*.tar"))
    samples = options.steps * options.batch * options.processes
    trainer = str(Path(__file__).with_name("open_clip_on_cpu.py"))
    words = [trainer, "--device", "cpu", "--dist-backend", "gloo", "--precision", "fp32"]
    words += ["--model", f"local-dir:{folder}/student", "--distill-model", f"local-dir:{folder}/teacher"]
    words += ["--distill-pretrained", "open_clip_model.safetensors", "--local-loss", "--gather-with-grad"]
    words += ["--train-data", "::".join(map(str, shards)), "--dataset-type", "webdataset", "--dataset-resampled"]
    words += [
        "--train-num-samples",
        str(samples),
        "--batch-size",
        str(options.batch),
        "--workers",
        "1",
        "--epochs",
        "1",
    ]
    words += ["--log-every-n-steps", "1", "--save-frequency", "0", "--report-to", ""]
    speeds = [float(found) for found in SPEED.findall(run(words, folder, options))]
    return median(speeds[LEFT_OUT:])


def with_kd_accel(folder: Path, options: argparse.Namespace, *, store: Path | None) -> float:
    file = write_config(folder, options, store)
    run(["-m", "kd_accel", "train", str(file)], folder, options)
    rows = read_rows(folder / "runs" / "run" / "metrics.jsonl")
    subprocess.run(["rm", "-r", str(folder / "runs")], check=True)
    return median(row["samples_per_second"] for row in rows[LEFT_OUT:])


def write_config(folder: Path, options: argparse.Namespace, store: Path | None) -> Path:
    teacher = {"path": str(folder / "teacher")} if store is None else {"placement": "cached", "store": str(store)}
    config = {
        "name": "run",
        "output_dir": str(folder / "runs"),
        "precision": "fp32",
        "data": {"shards": str(options.shards), "batch_size": options.batch, "num_workers": 1},
        "student": {"arch": STUDENT},
        "teacher": teacher,
        "objective": {"terms": {"clip": {"kind": "clip"}, "kl": {"kind": "logit_kl"}}},
        "optim": {"lr": 5e-4, "steps": options.steps},
        "log": {"every_steps": 1},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).resolve().parents[3] / "shared" / "data" / "pairs" / "train"
    parser.add_argument("--shards", type=Path, default=beside, help="webdataset tars with .jpg and .txt")
    parser.add_argument("--batch", type=int, default=64, help="of a process")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tars", type=int, default=2, help="so many of the shards: the teacher's features are stored")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(folder / "teacher", TEACHER)
        write_model(folder / "student", STUDENT)
        options.shards = link_shards(options.shards, folder / "shards", options.tars)
        store = folder / "store"
        run(["-m", "kd_accel", "embed", str(write_config(folder, options, None)), f"out={store}"], folder, options)
        cases = {
            "open_clip": lambda: with_open_clip(folder, options),
            "kd_accel, live teacher": lambda: with_kd_accel(folder, options, store=None),
            "kd_accel, stored teacher": lambda: with_kd_accel(folder, options, store=store),
        }
        speeds = {name: [] for name in cases}
        for _ in range(options.repeats):
            for name, case in cases.items():
                speeds[name].append(case())
                print(f"{name}: {speeds[name][-1]:.1f} samples/s", flush=True)
    best = {name: max(found) for name, found in speeds.items()}
    print(f"\n{options.processes} processes x {options.batch}, open_clip_torch {open_clip.__version__}")
    for name, speed in best.items():
        print(f"{name:26} {speed:8.1f} samples/s {speed / best['open_clip']:6.2f} x")
    print(json.dumps({"samples_per_second": best, "all": speeds}))


if __name__ == "__main__":
    main()
