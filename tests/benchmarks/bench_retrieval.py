"""What n images cost against n captions, and against n classes: seconds, and memory above the features.

    python tests/benchmarks/bench_retrieval.py                          # n = 10,000 and 30,000
    torchrun --nproc_per_node 2 tests/benchmarks/bench_retrieval.py 100000 --one retrieval

Random pairs of 512 numbers in fp32, one thread per process, every case in processes of its own. `retrieval` is recall
and mean rank both ways, `classes` the five best of n classes for each image; `matrix` is the whole score matrix in fp32
and the ten best of its rows and columns, up to 10,000 pairs. `core` is the processor time of the first process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from output import add_output, peak_bytes, write
from torch import Tensor

from kd_accel import distributed, processes
from kd_accel.evals.retrieval import recall
from kd_accel.evals.zero_shot import classify

WIDTH = 512
LARGEST_MATRIX = 10_000


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
    """One case in this process, or in the processes of a launcher; prints json."""
    processes.start_process_group(3600)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(pairs, WIDTH)
    texts = F.normalize(images + 5 * torch.randn(pairs, WIDTH), dim=1)
    images, owner = F.normalize(images, dim=1), torch.arange(pairs)
    before, began, core = peak_bytes(), time.perf_counter(), time.process_time()
    top1 = CASES[case](images, texts, owner)
    row = {"ranks": distributed.world_size(), "seconds": time.perf_counter() - began}
    row |= {"core_seconds": time.process_time() - core, "peak_bytes": peak_bytes() - before, "top1": top1}
    if distributed.is_main():
        print(json.dumps(row), flush=True)
    processes.end_process(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=int, nargs="*", default=[10_000, 30_000])
    parser.add_argument("--one", choices=CASES, help="one case in this process, or in the launcher's; prints json")
    add_output(parser)
    options = parser.parse_args()
    if options.one:
        one(options.one, options.pairs[0])
        return
    print(f"{'':10}{'n':>9}{'ranks':>7}{'seconds':>9}{'core':>9}{'peak MiB':>10}{'top-1 %':>8}", flush=True)
    found = {}
    for pairs in options.pairs:
        found[str(pairs)] = rows = {}
        for case in list(CASES)[pairs > LARGEST_MATRIX :]:
            words = [sys.executable, __file__, str(pairs), "--one", case]
            rows[case] = row = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
            print(_line(case, pairs, row), flush=True)
    write(options.output, found)


def _line(case: str, pairs: int, row: dict) -> str:
    figures = f"{row['seconds']:>9.1f}{row['core_seconds']:>9.1f}{row['peak_bytes'] / 2**20:>10,.0f}"
    return f"{case:10}{pairs:>9,}{row['ranks']:>7}{figures}{100 * row['top1']:>8.2f}"


if __name__ == "__main__":
    main()
