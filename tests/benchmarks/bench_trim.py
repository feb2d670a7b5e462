"""What cutting the padding off captions saves a text tower: tokens, and time of forward and backward.

    python tests/benchmarks/bench_trim.py                        # ../shared/data/pairs/train; minutes on one thread
    python tests/benchmarks/bench_trim.py --shards SHARDS --width 512 --layers 12 --device cuda

Captions in the order of the shards' samples, shuffled, in batches of `--batch`; CLIP's BPE; times are medians over
`--batches` batches, whole context and cut in turn."""

from __future__ import annotations

import argparse
import random
import tarfile
import time
from pathlib import Path
from statistics import mean, median

import torch
from distilling import add_shards
from open_clip import SimpleTokenizer
from output import add_device, add_output, write

from kd_accel.models.text import encode_text, text_pad
from kd_accel.models.towers import construct
from kd_accel.trim import trimmed

CONTEXTS = (77, 32)


def read_captions(shards: Path) -> list[str]:
    captions = []
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            captions += [tar.extractfile(member).read().decode() for member in tar if member.name.endswith(".txt")]
    return captions


def seconds(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """One forward and one backward pass of the text tower."""
    sync = torch.cuda.synchronize if tokens.is_cuda else lambda: None
    model.zero_grad(set_to_none=True)
    sync()
    began = time.perf_counter()
    encode_text(model, tokens).sum().backward()
    sync()
    return time.perf_counter() - began


def measure(captions: list[str], context: int, options: argparse.Namespace) -> dict:
    vision = {"image_size": 32, "patch_size": 32, "width": 64, "layers": 1}
    text = {"context_length": context, "width": options.width, "heads": options.width // 64, "layers": options.layers}
    model_cfg = {"embed_dim": options.width, "vision_cfg": vision, "text_cfg": text}
    model = construct(model_cfg, where="bench").to(options.device)
    tokenize, times, lengths = SimpleTokenizer(context_length=context), {"full": [], "cut": []}, []
    for start in range(0, options.batches * options.batch, options.batch):
        full = tokenize(captions[start : start + options.batch])
        cut = trimmed(full, text_pad(text))
        lengths.append(cut.shape[1])
        if start == 0:
            seconds(model, full.to(options.device))  # warm-up
        times["full"].append(seconds(model, full.to(options.device)))
        times["cut"].append(seconds(model, cut.to(options.device)))
    row = {"mean_length": mean(lengths), "longest": max(lengths)}
    row |= {f"{name}_seconds": median(taken) for name, taken in times.items()}
    return row | {"tokens": mean(lengths) / context, "speedup": row["full_seconds"] / row["cut_seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shards(parser)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    add_device(parser)
    add_output(parser)
    options = parser.parse_args()
    captions = read_captions(options.shards)
    random.Random(0).shuffle(captions)
    torch.manual_seed(0)
    rows = {str(context): measure(captions, context, options) for context in CONTEXTS}
    print(f"{len(captions):,} captions, batches of {options.batch}, width {options.width}, {options.layers} layers")
    print(f"{'context':>8}{'mean T':>8}{'longest':>9}{'full ms':>10}{'cut ms':>10}{'tokens':>9}{'time':>8}")
    for context, row in rows.items():
        print(
            f"{context:>8}{row['mean_length']:>8.1f}{row['longest']:>9}{1e3 * row['full_seconds']:>10.1f}"
            f"{1e3 * row['cut_seconds']:>10.1f}{row['tokens']:>9.0%}{1 / row['speedup']:>8.0%}"
        )
    write(options.output, rows)


if __name__ == "__main__":
    main()
