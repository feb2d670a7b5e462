"""What packed self-attention (kd_accel/models/attention.py) saves over torch's nn.MultiheadAttention.

    python tests/benchmarks/bench_attention.py                                       # CLIP's models, narrow; a minute
    python tests/benchmarks/bench_attention.py --teachers ViT-L-14 --students ViT-B-16 --device cuda --precision bf16

Forward passes of a teacher's image tower (on a CPU 16 images at a time), forward and backward passes of a student's two
towers: random weights, `--rows` rows, captions of 32 tokens; in turn, the best of `--repeats`. On a CPU seconds are the
processor time of one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from copy import deepcopy

import open_clip
import torch
from bench_open_clip import MODELS, model_cfg
from output import add_device, add_output, write
from torch import nn

from kd_accel.models.attention import pack_attention

AT_ONCE, TOKENS = 16, 32


def build(name: str, options: argparse.Namespace) -> nn.Module:
    model = open_clip.CLIP(**model_cfg(name)) if name in MODELS else open_clip.create_model(name)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    return model.to(options.device, dtype)


def teach(model: nn.Module, options: argparse.Namespace) -> Callable[[], None]:
    model.eval().requires_grad_(False)
    size, dtype = model.visual.image_size, model.visual.conv1.weight.dtype
    image = torch.randn(options.rows, 3, *size, device=options.device, dtype=dtype)

    def run() -> None:
        for piece in image.split(AT_ONCE if options.device == "cpu" else options.rows):
            model.encode_image(piece)

    return run


def learn(model: nn.Module, options: argparse.Namespace) -> Callable[[], None]:
    model.train()
    size, dtype = model.visual.image_size, model.visual.conv1.weight.dtype
    image = torch.randn(options.rows, 3, *size, device=options.device, dtype=dtype)
    model.attn_mask = model.attn_mask[:TOKENS, :TOKENS]
    model.positional_embedding = nn.Parameter(model.positional_embedding[:TOKENS].detach().clone())
    text = torch.randint(1, model.vocab_size, (options.rows, TOKENS), device=options.device)

    def run() -> None:
        said = model.encode_image(image), model.encode_text(text)
        sum(rows.float().square().sum() for rows in said).backward()
        model.zero_grad()

    return run


def seconds(run: Callable[[], None], device: str) -> float:
    clock = time.perf_counter if device == "cuda" else time.process_time
    began = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", nargs="*", default=["B/16", "L/14"], help="widths / 8, or names of open_clip")
    parser.add_argument("--students", nargs="*", default=["B/32"], help="the same")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--repeats", type=int, default=5)
    add_device(parser)
    add_output(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = [(f"teacher {name}", name, teach) for name in options.teachers]
    cases += [(f"student {name}", name, learn) for name in options.students]
    found = {}
    for case, name, make in cases:
        torchs = build(name, options)
        ours = deepcopy(torchs)
        pack_attention(ours)
        runs = {"torch": make(torchs, options), "packed": make(ours, options)}
        taken = [{how: seconds(run, options.device) for how, run in runs.items()} for _ in range(options.repeats + 1)][
            1:
        ]
        best = {how: min(row[how] for row in taken) for how in runs}
        print(f"{case:16} torch {best['torch']:.3f} s, packed {best['packed']:.3f} s:", end=" ")
        print(f"{best['packed'] / best['torch']:.2f} of it", flush=True)
        found[case] = {how: {"seconds": value} for how, value in best.items()}
    write(options.output, found)


if __name__ == "__main__":
    main()
