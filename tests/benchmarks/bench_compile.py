"""What torch.compile makes of a step: forward and backward of a student, eager and compiled in turn, on CPU or CUDA.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_compile.py [vit | cnn ...] [--output compile.json]

On a CPU seconds are those that the process was computing, so that other programs on the machine do not count.
"""

from __future__ import annotations

import argparse
import time

import torch
from output import add_output, write
from torch import Tensor, nn

from kd_accel.models.compiled import compile_blocks
from kd_accel.models.text import encode_text
from kd_accel.models.towers import build_open_clip

VIT = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 192, "layers": 4, "head_width": 32},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 192, "heads": 4, "layers": 2},
}
WIDE = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 384, "layers": 12, "head_width": 64},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 4},
}
CNN = {"embed_dim": 128, "vision_cfg": {"timm_classifier": "resnet18", "image_size": 64}}
CASES = {"vit": VIT, "wide": WIDE, "cnn": CNN}
ROWS, ROUNDS = 32, 7


def measure(case: str, device: torch.device) -> dict[str, float]:
    """Seconds on the wall until the first compiled step is done, then of the best eager and compiled one."""
    eager, compiled = (_model(case).to(device) for _ in range(2))
    compile_blocks(compiled)
    pixels = torch.randn(ROWS, 3, 64, 64, device=device)
    tokens = torch.randint(1, 49000, (ROWS, 20), device=device) if "text_cfg" in CASES[case] else None
    began = time.perf_counter()
    _seconds(compiled, pixels, tokens)
    found = {"first": time.perf_counter() - began, "eager": torch.inf, "compiled": torch.inf}
    _seconds(eager, pixels, tokens)
    for _ in range(ROUNDS):
        found["eager"] = min(found["eager"], _seconds(eager, pixels, tokens))
        found["compiled"] = min(found["compiled"], _seconds(compiled, pixels, tokens))
    return found | {"speedup": found["eager"] / found["compiled"]}


def _model(case: str) -> nn.Module:
    torch.manual_seed(0)
    return build_open_clip(CASES[case], pretrained=None, preprocess=None, name="student")[0]


def _seconds(model: nn.Module, pixels: Tensor, tokens: Tensor | None) -> float:
    """Of one forward and backward pass."""
    clock = time.perf_counter if pixels.is_cuda else time.process_time
    began = clock()
    loss = model.encode_image(pixels).square().sum()
    if tokens is not None:
        loss = loss + encode_text(model, tokens).square().sum()
    loss.backward()
    model.zero_grad()
    if pixels.is_cuda:
        torch.cuda.synchronize()
    return clock() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)}")
    add_output(parser)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {}
    for case in arguments.cases:
        found[case] = measure(case, device)
        print(f"{case:6}" + "".join(f"  {name} {value:.3f}" for name, value in found[case].items()), flush=True)
    write(arguments.output, found)


if __name__ == "__main__":
    main()
