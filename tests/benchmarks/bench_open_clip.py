"""Training samples per second beside open_clip's own trainer with --distill-model: same models, batch, data, processes.

    python tests/benchmarks/bench_open_clip.py                        # two CPU processes, fp32; half an hour
    python tests/benchmarks/bench_open_clip.py --teachers B/16 --repeats 1 --open-clip-python venv/bin/python
    python tests/benchmarks/bench_open_clip.py --precision bf16            # amp_bf16 there; for CPUs with units for it

open_clip's trainer is `open_clip_train` of open_clip_torch (3.3.0 when this was written); it needs pandas
(pip install "open_clip_torch[training]"), perhaps in an environment of its own, and is run by torchrun as its README
has it: --local-loss --gather-with-grad, webdataset tars, one loader process per training process, no evaluation. Here:
DDP, `clip` and `logit_kl`, which are open_clip's two losses; live teacher; then the teacher's features from a store.
The models are CLIP's own with every width divided by eight for a CPU: the student a ViT-B/32, its teacher a ViT-B/16
or a ViT-L/14. Pixels, patches, layers and the 77 tokens of a caption are theirs. A speed is the median over steps of
all processes, the first steps left out; runs alternate, and the best of the repeats counts, because the machine may be
shared.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import open_clip
import torch
from distilling import add_shards, link_shards, write_config
from output import add_output, write
from safetensors.torch import save_file

from kd_accel.text_files import read_rows

WIDTHS = 8  # what they are divided by
MODELS = {  # embedding, patch, layers and width of the pictures, width of the captions
    "B/32": (512, 32, 12, 768, 512),
    "B/16": (512, 16, 12, 768, 512),
    "L/14": (768, 14, 24, 1024, 768),
}
STUDENT = "B/32"
PRECISIONS = {"fp32": "fp32", "bf16": "amp_bf16"}  # ours, theirs
HEAD = 32  # width of an attention head; theirs is 64
LEFT_OUT = 5  # steps at the start
SPEED = re.compile(r"([0-9.e+]+)/s, [0-9.e+]+/s/gpu")


def model_cfg(name: str) -> dict:
    """What open_clip builds."""
    embed, patch, layers, width, text = MODELS[name]
    return {
        "embed_dim": embed // WIDTHS,
        "vision_cfg": {
            "image_size": 224,
            "patch_size": patch,
            "width": width // WIDTHS,
            "layers": layers,
            "head_width": HEAD,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": text // WIDTHS,
            "heads": text // WIDTHS // HEAD,
            "layers": 12,
        },
    }


def write_model(folder: Path, model_cfg: dict) -> None:
    """A release of random weights, which both trainers load."""
    torch.manual_seed(0)
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {}}))
    state = open_clip.CLIP(**model_cfg).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "open_clip_model.safetensors")


def run(words: list[str], folder: Path, options: argparse.Namespace, python: str = sys.executable) -> str:
    """Its output."""
    threads = max(1, (os.cpu_count() or 1) // options.processes)
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "disabled"}
    launcher = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.processes}"]
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


def with_open_clip(folder: Path, options: argparse.Namespace, *more: str) -> float:
    shards = sorted(options.shards.glob("*.tar"))
    samples = options.steps * options.batch * options.processes
    trainer = str(Path(__file__).with_name("open_clip_on_cpu.py"))
    words = [trainer, "--device", "cpu", "--dist-backend", "gloo", "--precision", PRECISIONS[options.precision]]
    words += ["--model", f"local-dir:{folder}/student", "--distill-model", f"local-dir:{folder}/teacher"]
    words += ["--distill-pretrained", "open_clip_model.safetensors", "--local-loss", "--gather-with-grad"]
    words += ["--train-data", "::".join(map(str, shards)), "--dataset-type", "webdataset", "--dataset-resampled"]
    words += ["--train-num-samples", str(samples), "--batch-size", str(options.batch), "--epochs", "1"]
    words += ["--workers", "1"]
    words += ["--log-every-n-steps", "1", "--save-frequency", "0", "--report-to", "", *more]
    speeds = [float(found) for found in SPEED.findall(run(words, folder, options, options.open_clip_python))]
    return median(speeds[LEFT_OUT:])


def with_kd_accel(folder: Path, options: argparse.Namespace, *more: str, store: Path | None) -> float:
    file = config_of(folder, options, store)
    run(["-m", "kd_accel", "train", str(file), f"precision={options.precision}", *more], folder, options)
    rows = read_rows(folder / "runs" / "run" / "metrics.jsonl")
    shutil.rmtree(folder / "runs")
    return median(row["samples_per_second"] for row in rows[LEFT_OUT:])


def config_of(folder: Path, options: argparse.Namespace, store: Path | None) -> Path:
    """The training beside the teacher in `folder`, or on its features in `store`."""
    teacher = {"path": str(folder / "teacher")} if store is None else {"placement": "cached", "store": str(store)}
    sizes = {"batch": options.batch, "num_workers": 1, "steps": options.steps}
    return write_config(folder, shards=options.shards, student=model_cfg(STUDENT), teacher=teacher, **sizes)


def versions(python: str) -> dict[str, str]:
    """Of open_clip and torch, in the environment of that interpreter."""
    program = "import json, open_clip, torch; print(json.dumps([open_clip.__version__, torch.__version__]))"
    out = subprocess.run([python, "-c", program], check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(zip(("open_clip", "torch"), json.loads(out), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shards(parser)
    parser.add_argument("--batch", type=int, default=64, help="of a process")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="fp32")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--tars", type=int, default=1, help="so many of the shards: the teacher's features are stored")
    parser.add_argument("--teachers", nargs="+", choices=list(MODELS), default=["B/16", "L/14"])
    parser.add_argument("--open-clip-python", default=sys.executable, help="of an environment with open_clip's trainer")
    parser.add_argument("--compile", action="store_true", help="both trainers with torch.compile too: minutes more")
    add_output(parser)
    options = parser.parse_args()
    theirs = versions(options.open_clip_python)
    print(f"{options.processes} processes x {options.batch}, {options.precision};", end=" ")
    print(f"kd_accel with torch {torch.__version__}; open_clip {theirs['open_clip']} with torch {theirs['torch']}")
    figures: dict = {"versions": {"open_clip": theirs, "kd_accel": {"torch": torch.__version__}}}
    given = options.shards
    for teacher in options.teachers:
        with tempfile.TemporaryDirectory() as temporary:
            options.shards = link_shards(given, Path(temporary) / "shards", options.tars)
            figures[teacher] = measure(teacher, Path(temporary), options)
        write(options.output, figures)


def measure(teacher: str, folder: Path, options: argparse.Namespace) -> dict[str, dict]:
    """Speeds beside a teacher of that name, by trainer."""
    write_model(folder / "teacher", model_cfg(teacher))
    write_model(folder / "student", model_cfg(STUDENT))
    store = folder / "store"
    run(["-m", "kd_accel", "embed", str(config_of(folder, options, None)), f"out={store}"], folder, options)
    cases = {
        "open_clip": lambda: with_open_clip(folder, options),
        "kd_accel, live teacher": lambda: with_kd_accel(folder, options, store=None),
        "kd_accel, stored teacher": lambda: with_kd_accel(folder, options, store=store),
    }
    if options.compile:
        cases["open_clip, --torchcompile"] = lambda: with_open_clip(folder, options, "--torchcompile")
        cases["kd_accel, live, compiled"] = lambda: with_kd_accel(folder, options, "train.compile=true", store=None)
    speeds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(options.repeats):
        for name, case in cases.items():
            speeds[name].append(case())
            print(f"  {name}: {speeds[name][-1]:.1f} samples/s", flush=True)
    best = {name: max(found) for name, found in speeds.items()}
    print(f"{teacher} -> {STUDENT}")
    for name, speed in best.items():
        print(f"{name:26} {speed:8.1f} samples/s {speed / best['open_clip']:6.2f} x", flush=True)
    return {
        name: {"samples_per_second": speed, "speedup": speed / best["open_clip"], "all": speeds[name]}
        for name, speed in best.items()
    }


if __name__ == "__main__":
    main()
