"""What ranking n images by n captions costs: seconds, and memory above the features.

    python tests/benchmarks/bench_retrieval.py                          # 10,000 and 30,000 pairs, one process
    torchrun --nproc_per_node 2 tests/benchmarks/bench_retrieval.py 100000

Random pairs of 512 numbers in fp32. `matrix` is the whole score matrix in fp32 with two sorts out of the best ten, for
both directions; it runs up to 10,000 pairs, on one process. Every case runs in a process of its own under `--one`.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_accel import distributed
from kd_accel.evals.retrieval import recall

WIDTH = 512
LARGEST_MATRIX = 10_000


def peak() -> float:
    """MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def matrix(images: Tensor, texts: Tensor, owner: Tensor) -> dict[str, float]:
    """Recall of the n x n matrix."""
    scores = texts @ images.T
    metrics = {}
    for what, lines in (("image", scores), ("text", scores.T)):
        hits = lines.topk(10, dim=1).indices == owner[:, None]
        metrics |= {f"{what}_retrieval_recall@{k}": hits[:, :k].any(1).double().mean().item() for k in (1, 5, 10)}
    return metrics


def one(kind: str, pairs: int) -> None:
    """One case in this process, or in the processes of a launcher."""
    distributed.start_process_group(3600)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(pairs, WIDTH)
    texts = F.normalize(images + 5 * torch.randn(pairs, WIDTH), dim=1)
    images, owner = F.normalize(images, dim=1), torch.arange(pairs)
    before, began = peak(), time.perf_counter()
    metrics = (recall if kind == "tiles" else matrix)(images, texts, owner)
    if distributed.is_main():
        seconds, grown = time.perf_counter() - began, peak() - before
        r1 = 100 * metrics["image_retrieval_recall@1"]
        print(f"{kind:8}{pairs:>10,}{distributed.world_size():>7}{seconds:>9.1f}{grown:>10,.0f}{r1:>8.2f}", flush=True)
    distributed.end_process(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=int, nargs="*", default=[10_000, 30_000])
    parser.add_argument("--one", help="tiles or matrix: one case in this process")
    options = parser.parse_args()
    if options.one or "RANK" in os.environ:
        one(options.one or "tiles", options.pairs[0])
        return
    print(f"{'':8}{'pairs':>10}{'ranks':>7}{'seconds':>9}{'peak MiB':>10}{'R@1 %':>8}", flush=True)
    for pairs in options.pairs:
        for kind in ("matrix", "tiles")[pairs > LARGEST_MATRIX :]:
            subprocess.run([sys.executable, __file__, str(pairs), "--one", kind], check=True)


if __name__ == "__main__":
    main()
