"""What scoring images by prompts costs: seconds, and memory above the inputs.

    python tests/benchmarks/bench_filter.py                  # 200,000 images x 1,000 prompts of 512; half a minute
    python tests/benchmarks/bench_filter.py --images 50000 --output filter.json

One thread, features in fp16 as they come from a store, in shards of 10,000; random directions around 100 centers, so
that scores are as uneven as real ones. `score` finds the best prompt of every image and the `--top-k` images of every
prompt; `distinct` drops near-duplicates among the first `--selected` images, of which a tenth are copies.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F
from output import add_output, peak_bytes, write

from kd_accel.filter.scoring import TopK, distinct, score_shard

SHARD, CENTERS = 10_000, 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--selected", type=int, default=20_000)
    add_output(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    centers = torch.randn(CENTERS, options.width)
    features = torch.empty(options.images, options.width, dtype=torch.float16)
    for part in features.split(SHARD):
        part.copy_(centers[torch.randint(CENTERS, (len(part),))] + torch.randn(len(part), options.width))
    prompts = F.normalize(
        centers[torch.randint(CENTERS, (options.prompts,))] + torch.randn(options.prompts, options.width), dim=1
    )
    keys = np.array([f"{i:09d}" for i in range(options.images)])
    before, began = peak_bytes(), time.perf_counter()
    top = TopK(options.prompts, options.top_k)
    for shard, rows in enumerate(range(0, options.images, SHARD)):
        score_shard(features[rows : rows + SHARD], keys[rows : rows + SHARD], prompts, shard=shard, top=top)
    row = {"images": options.images, "prompts": options.prompts, "score_seconds": time.perf_counter() - began}
    row["score_peak_bytes"] = peak_bytes() - before
    assert len(top.row) == options.prompts * options.top_k

    chosen = features[: options.selected].clone()
    chosen[::10] = chosen[1::10]
    began = time.perf_counter()
    kept = distinct(chosen, 0.999)
    row |= {"selected": options.selected, "kept": int(kept.sum()), "distinct_seconds": time.perf_counter() - began}
    print("\n".join(f"{key:16}{value:>14,.1f}" for key, value in row.items()))
    write(options.output, row)


if __name__ == "__main__":
    main()
