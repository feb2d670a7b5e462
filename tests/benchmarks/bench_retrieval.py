"""What n images cost against n captions, and against n classes: seconds, and memory above the features.

    python tests/benchmarks/bench_retrieval.py                          # n = 10,000 and 30,000
    torchrun --nproc_per_node 2 tests/benchmarks/bench_retrieval.py 100000 --one retrieval

Random pairs of 512 numbers in fp32, one thread per process, every case in processes of its own. `retrieval` is recall
and mean rank both ways, `classes` the five best of n classes for each image; `matrix` is the whole score matrix in fp32
and the ten best of its rows and columns, up to 10,000 pairs. `core` is the processor time of the first process.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_accel import distributed
from kd_accel.evals.retrieval import recall
from kd_accel.evals.zero_shot import classify

WIDTH = 512
LARGEST_MATRIX = 10_000


def peak() -> float:
    """MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def matrix(images: Tensor, texts: Tensor, owner: Tensor) -> float:
    """Recall at 1 of captions, by the n x n matrix."""
    scores = texts @ images.T
    hits = [lines.topk(10, dim=1).indices == owner[:, None] for lines in (scores, scores.T)]
    return hits[0][:, 0].double().mean().item()


def retrieval(images: Tensor, texts: Tensor, owner: Tensor) -> float:
    return recall(images, texts, owner)["image_retrieval_recall@1"]


def classes(images: Tensor, texts: Tensor, owner: Tensor) -> float:
    """Accuracy of images, with the texts as classes."""
    return (classify(images, texts)[:, 0] == owner).double().mean().item()


CASES = {"matrix": matrix, "retrieval": retrieval, "classes": classes}


def one(case: str, pairs: int) -> None:
    """One case in this process, or in the processes of a launcher."""
    distributed.start_process_group(3600)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(pairs, WIDTH)
    texts = F.normalize(images + 5 * torch.randn(pairs, WIDTH), dim=1)
    images, owner = F.normalize(images, dim=1), torch.arange(pairs)
    before, began, core = peak(), time.perf_counter(), time.process_time()
    top1 = CASES[case](images, texts, owner)
    seconds, core = time.perf_counter() - began, time.process_time() - core
    if distributed.is_main():
        ranks, grown = distributed.world_size(), peak() - before
        print(f"{case:10}{pairs:>9,}{ranks:>7}{seconds:>9.1f}{core:>9.1f}{grown:>10,.0f}{100 * top1:>8.2f}", flush=True)
    distributed.end_process(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=int, nargs="*", default=[10_000, 30_000])
    parser.add_argument("--one", choices=CASES, help="one case in this process, or in the launcher's")
    options = parser.parse_args()
    if options.one:
        one(options.one, options.pairs[0])
        return
    print(f"{'':10}{'n':>9}{'ranks':>7}{'seconds':>9}{'core':>9}{'peak MiB':>10}{'top-1 %':>8}", flush=True)
    for pairs in options.pairs:
        for case in list(CASES)[pairs > LARGEST_MATRIX :]:
            subprocess.run([sys.executable, __file__, str(pairs), "--one", case], check=True)


if __name__ == "__main__":
    main()
