"""Images per second of an evaluation, beside a bare loop of forward passes of the same model over as many images.

    python tests/benchmarks/bench_eval.py                         # ../shared/data/zeroshot/flowers5; minutes on a CPU
    python tests/benchmarks/bench_eval.py --set SET --arch ViT-B-16 --precision bf16 --batch 256 --output eval.json

`forward` is the image tower alone, on pixels that lie ready. `eval` is what the verb does for a set when the model is
loaded: read and decode the images in `--workers` processes, encode them and the class texts, classify, write the row.
Random weights; in turn, the best of `--repeats`. Overhead is the share of its images per second that `eval` loses.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from bench_open_clip import write_model
from open_clip.factory import get_model_config
from output import add_output, write

from kd_accel.eval_config import EvalConfig
from kd_accel.evals.encoder import Encoder, load_encoder
from kd_accel.evals.evaluate import evaluate
from kd_accel.evals.plan import Plan, make_plan
from kd_accel.schema import validate

SET = Path(__file__).resolve().parents[3] / "shared" / "data" / "zeroshot" / "flowers5"
GOAL = 0.15


def forward(encoder: Encoder, number: int, batch: int) -> float:
    """Images per second of so many in batches that lie ready."""
    views = torch.randint(0, 256, (batch, 3, *encoder.image_input.size), dtype=torch.uint8)
    began = time.perf_counter()
    for start in range(0, number, batch):
        encoder.encode_images(views[: number - start])
    return number / (_now(encoder) - began)


def whole(encoder: Encoder, plan: Plan, config: EvalConfig, number: int, output: Path) -> float:
    """Images per second of a set of so many."""
    began = time.perf_counter()
    list(evaluate(encoder, plan.jobs, config, output=output, again=True))
    return number / (_now(encoder) - began)


def _now(encoder: Encoder) -> float:
    if encoder.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", type=Path, default=SET, help="an evaluation set with labels")
    parser.add_argument("--arch", default="ViT-B-32", help="of open_clip")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    add_output(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(folder / "release", get_model_config(options.arch))
        words = {"model": str(folder / "release"), "data": str(options.set)}
        load = {"precision": options.precision, "batch_size": options.batch, "num_workers": options.workers}
        config = validate(EvalConfig, words | load)
        plan = make_plan(config)
        encoder = load_encoder(config.model, precision=config.precision)
        number = sum(len(job.test.samples()) for job in plan.jobs)
        encoder.encode_images(torch.zeros(options.batch, 3, *encoder.image_input.size, dtype=torch.uint8))
        speeds: dict[str, list[float]] = {"forward": [], "eval": []}
        for _ in range(options.repeats):
            speeds["forward"].append(forward(encoder, number, options.batch))
            speeds["eval"].append(whole(encoder, plan, config, number, folder / "results.jsonl"))
    best = {name: max(found) for name, found in speeds.items()}
    overhead = 1 - best["eval"] / best["forward"]
    print(f"{options.arch}, {number} images: forward {best['forward']:.1f}/s, eval {best['eval']:.1f}/s,", end=" ")
    print(f"overhead {100 * overhead:.1f} % (goal {100 * GOAL:.0f})")
    write(options.output, {name: {"images_per_second": found} for name, found in best.items()} | {"overhead": overhead})


if __name__ == "__main__":
    main()
