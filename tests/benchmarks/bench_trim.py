"""What cutting the padding off captions saves a text tower: tokens, and time of forward and backward.

    python tests/benchmarks/bench_trim.py                        # ../shared/data/pairs/train; minutes on one thread
    python tests/benchmarks/bench_trim.py --shards SHARDS --width 512 --layers 12 --device cuda

Captions in the order of the shards' samples, shuffled, in batches of `--batch`; CLIP's BPE; times are medians over
`--batches` batches, whole context and cut in turn. Prints the table and one json line.
"""

from __future__ import annotations

import argparse
import json
import random
import tarfile
import time
from pathlib import Path
from statistics import mean, median

import torch
from open_clip import SimpleTokenizer

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
    row = {"context": context, "mean_length": mean(lengths), "longest": max(lengths)}
    row |= {f"{name}_ms": 1e3 * median(taken) for name, taken in times.items()}
    return row | {"tokens_ratio": mean(lengths) / context, "time_ratio": row["cut_ms"] / row["full_ms"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).resolve().parents[3] / "shared" / "data" / "pairs" / "train"
    parser.add_argument("--shards", type=Path, default=beside)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    captions = read_captions(options.shards)
    random.Random(0).shuffle(captions)
    torch.manual_seed(0)
    rows = [measure(captions, context, options) for context in CONTEXTS]
    print(f"{len(captions):,} captions, batches of {options.batch}, width {options.width}, {options.layers} layers")
    print(f"{'context':>8}{'mean T':>8}{'longest':>9}{'full ms':>10}{'cut ms':>10}{'tokens':>9}{'time':>8}")
    for row in rows:
        print(
            f"{row['context']:>8}{row['mean_length']:>8.1f}{row['longest']:>9}{row['full_ms']:>10.1f}"
            f"{row['cut_ms']:>10.1f}{row['tokens_ratio']:>9.0%}{row['time_ratio']:>8.0%}"
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
