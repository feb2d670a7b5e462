"""Two steps of every cell of the command line, eager and compiled, on the ranks it is launched with; torchrun.

Graphs are traced and differentiated as in a training but not made kernels (tests/models/test_compiled.py does that).
compile_worker.py TEACHER OUT ENGINE,ACCUMULATE ...     writes OUT: per cell the largest difference, and the graphs
"""

import functools
import json
import sys
from pathlib import Path

import torch
from distributed import parity_worker
from distributed.parity_worker import Cell, train
from torch import Tensor
from torch._dynamo.utils import counters

from kd_accel import distributed, processes
from kd_accel.config import TrainConfig

eager = parity_worker.config
parity_worker.STEPS = 2


def compiled(cell: Cell, teacher: str) -> TrainConfig:
    config = eager(cell, teacher)
    return config.model_copy(
        update={
            "train": config.train.model_copy(update={"compile": True}),
            "student": config.student.model_copy(update={"grad_checkpointing": True}),
        }
    )


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The worst element as a share of its tensor's largest one."""
    assert found.keys() == expected.keys()
    finite = {name: tensor for name, tensor in expected.items() if tensor.isfinite().all()}
    return max(((found[n] - t).abs().max() / t.abs().max().clamp_min(1e-30)).item() for n, t in finite.items())


def main() -> None:
    teacher, out, *cells = sys.argv[1:]
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    result = {}
    for words in cells:
        engine, accumulate = words.split(",")
        cell = Cell(engine, int(accumulate), "clip_kd", "fp32")
        parity_worker.config = eager
        expected = train(cell, teacher)
        torch._dynamo.reset()
        counters.clear()
        parity_worker.config = compiled
        found = train(cell, teacher)
        graphs, breaks = counters["stats"]["unique_graphs"], dict(counters["graph_break"])
        result[words] = {"apart": apart(found, expected), "graphs": graphs, "breaks": breaks}
    if distributed.is_main():
        Path(out).write_text(json.dumps(result))
    processes.end_process(0)


if __name__ == "__main__":
    main()
