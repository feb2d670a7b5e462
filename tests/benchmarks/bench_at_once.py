"""What a frozen image tower takes by how many images it sees at a time: why a CPU asks for a few (models/image.py).

    python tests/benchmarks/bench_at_once.py                                  # CLIP's models, narrow; a minute
    python tests/benchmarks/bench_at_once.py ViT-B-16 RN50 --images 32        # open_clip's, whole; minutes

Processor seconds of `--images` random images in one thread, fp32, random weights; the numbers at a time take turns, and
the best of `--repeats` counts.
"""

from __future__ import annotations

import argparse
import time

import open_clip
import torch
from bench_open_clip import MODELS, model_cfg
from output import add_output, write
from torch import Tensor, nn


def tower(name: str) -> nn.Module:
    model = open_clip.CLIP(**model_cfg(name)) if name in MODELS else open_clip.create_model(name)
    return model.visual.eval().requires_grad_(False)


@torch.inference_mode()
def seconds(model: nn.Module, images: Tensor, at_once: int) -> float:
    began = time.process_time()
    for piece in images.split(at_once):
        model(piece)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", default=["B/32", "B/16", "L/14"], help="of these widths / 8, or of open_clip"
    )
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    add_output(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts = [options.images >> shift for shift in range(options.images.bit_length()) if options.images >> shift >= 2]
    images = torch.randn(options.images, 3, 224, 224)
    print(f"{'seconds':10}" + "".join(f"{count:>8}" for count in counts), flush=True)
    found = {}
    for name in options.models:
        model = tower(name)
        runs = [[seconds(model, images, count) for count in counts] for _ in range(options.repeats)]
        best = [min(taken) for taken in zip(*runs, strict=True)]
        print(f"{name:10}" + "".join(f"{value:>8.2f}" for value in best), flush=True)
        found[name] = {str(count): {"seconds": value} for count, value in zip(counts, best, strict=True)}
    write(options.output, found)


if __name__ == "__main__":
    main()
