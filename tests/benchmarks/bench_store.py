"""What a teacher costs in a step: live, from the store, and none.

    python tests/benchmarks/bench_store.py                                  # small ViTs on a CPU: a minute
    python tests/benchmarks/bench_store.py --precision bf16 --batch 256     # where there is a GPU

The three train in one process and in turn, since the machine may be shared, each on the same samples; the loader works
in the training process, so that reading the store counts in full. Medians over `--repeats` rounds of `--steps` steps.
Without a teacher the objective is `clip` alone; with one, `logit_kl` and `feature_mse` come to it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tiny
from distilling import take_step
from output import add_output, write

from kd_accel import assembly
from kd_accel.config import TrainConfig
from kd_accel.embed import verb
from kd_accel.embed_config import EmbedConfig
from kd_accel.engine import Engine
from kd_accel.launch import start_accelerator
from kd_accel.optim import build_optimizer
from kd_accel.schema import validate

ALLOWED = 1.05  # a cached step, in steps without a teacher
TOKENS, PIXELS = 32, 224


def arch(width: int, layers: int, text_width: int, text_layers: int) -> dict:
    image = {"image_size": PIXELS, "patch_size": 32, "width": width, "layers": layers, "head_width": 64}
    text = {"context_length": TOKENS, "vocab_size": 49408, "width": text_width, "heads": 4, "layers": text_layers}
    return {"embed_dim": 256, "vision_cfg": image, "text_cfg": text}


class Run:
    """A training as train.py puts it together, up to its files."""

    def __init__(self, config: TrainConfig, accelerator):
        torch.manual_seed(config.seed)
        teachers = assembly.build_teachers(config)
        student = assembly.build_student(config, teachers)
        config = assembly.fit_models(config, student, teachers)
        loader = assembly.build_loader(config, student, teachers)
        self.objective = assembly.build_objective(config, student, teachers, loader).to(accelerator.device)
        optimizer = build_optimizer(student, config.optim)
        self.engine = Engine(accelerator, student, teachers, optimizer=optimizer, config=config)
        self.engine.module.train()
        self.batches, self.device = iter(loader), accelerator.device

    def seconds(self, steps: int) -> float:
        """Of one step, the batch's way from the disk included."""
        began = time.perf_counter()
        for _ in range(steps):
            micro_batches = next(self.batches)
            ids = torch.cat([batch.ids for batch in micro_batches]).to(self.device)
            take_step(self.engine, self.objective, [(micro_batches, ids)])
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / steps


def configs(options: argparse.Namespace, folder: Path) -> dict[str, dict]:
    """By case; the store is not there yet."""
    release = tiny.write_teacher(folder / "teacher", arch(512, 8, 320, 6))
    shards = tiny.write_shards(folder / "shards", shards=4, per_shard=options.batch * 2)
    distil = {"kl": {"kind": "logit_kl"}, "feature": {"kind": "feature_mse"}}
    teachers = {
        "live": {"path": str(release)},
        "cached": {"placement": "cached", "store": str(folder / "store")},
        "no teacher": None,
    }
    return {
        case: {
            "name": "bench",
            "precision": options.precision,
            "data": {"shards": str(shards), "batch_size": options.batch, "num_workers": 0},
            "student": {"arch": arch(256, 4, 192, 3)},
            "teacher": teacher,
            "objective": {"terms": {"clip": {"kind": "clip"}} | (distil if teacher else {})},
            "optim": {"lr": 1e-4, "steps": 1000},
        }
        for case, teacher in teachers.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3, help="of a round")
    parser.add_argument("--repeats", type=int, default=11, help="rounds")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    add_output(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        wanted = configs(options, Path(name))
        verb.run(validate(EmbedConfig, wanted["live"] | {"out": f"{name}/store", "views": 2}))
        accelerator = start_accelerator(precision=options.precision, batch_size=options.batch, grad_clip_norm=1.0)
        runs = {case: Run(validate(TrainConfig, values), accelerator) for case, values in wanted.items()}
        rounds = {case: [] for case in runs}
        for number in range(options.repeats + 1):
            for case, run in runs.items():
                seconds = run.seconds(options.steps)
                rounds[case] += [seconds] if number else []  # the first round warms up
    steps = {
        case: median(a / b for a, b in zip(taken, rounds["no teacher"], strict=True)) for case, taken in rounds.items()
    }
    for case, taken in rounds.items():
        print(f"{case:10} {1000 * median(taken):8.1f} ms per step of {options.batch}; {steps[case]:.3f} of none")
    ratio = steps["cached"]
    write(options.output, {case: {"seconds": median(taken), "steps": steps[case]} for case, taken in rounds.items()})
    print(f"a cached step is {'within' if ratio <= ALLOWED else 'ABOVE'} {ALLOWED} of one without a teacher")


if __name__ == "__main__":
    main()
