"""One result, however it is computed: any number of ranks, micro-batches, and any engine give one big batch's.

Against one process, one micro-batch, fp32, no engine: gradients of the first step, losses, parameters and memory after
five. fp32: the largest difference within 1e-5 of each tensor's largest element. bf16: the difference of all gradients
(parameters) together, as a share of their norm, within what 8 bits of mantissa and ZeRO's bf16 gradients give.
"""

import itertools
import sys

import pytest
import torch
from conftest import run_process
from distributed import parity_worker
from distributed.parity_worker import ACCUMULATE, CELLS, ENGINES, PRECISIONS, RANKS, TERMS, Cell
from safetensors.torch import load_file
from torch import Tensor

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]  # the first test waits for all cells of two ranks

WORKER = parity_worker.__file__
KINDS = ("gradient", "parameter", "loss", "grad_norm")
FP32 = 1e-5
BF16 = {"gradient": 5e-2, "parameter": 5e-2, "loss": 3e-2, "grad_norm": 0.1}
Results = dict[str, Tensor]


def compute(folder, teacher, ranks: int, cells: str) -> None:
    """All of `cells` in one launch: a process group and the imports cost more than the steps."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    run_process([*launcher, WORKER, str(folder), str(teacher), cells], timeout=1500)


def load(folder, cell: Cell, ranks: int) -> Results:
    return load_file(folder / f"{cell.name}-{ranks}.safetensors")


@pytest.fixture(scope="module")
def some(tiny_teacher, tmp_path_factory):
    """The folder of the references and of two ranks in fp32."""
    folder = tmp_path_factory.mktemp("parity")
    compute(folder, tiny_teacher, 1, "reference")
    compute(folder, tiny_teacher, 2, "some")
    return folder


def difference(ours: Results, theirs: Results, kind: str, precision: str) -> float:
    """Of all tensors of a kind: the worst element as a share of its tensor's largest one, or the norms' share."""
    names = [name for name in theirs if name.startswith(f"{kind}.")]
    assert names
    assert set(names) == {name for name in ours if name.startswith(f"{kind}.")}
    pairs = [(ours[name], theirs[name]) for name in names]
    assert all(torch.equal(a.isfinite(), b.isfinite()) for a, b in pairs)  # log u of unseen samples is -inf
    pairs = [(a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)) for a, b in pairs]
    if precision == "bf16":
        a, b = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in zip(*pairs, strict=True))
        return ((a - b).norm() / b.norm()).item()
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() for a, b in pairs)


def check(folder, cell: Cell, ranks: int) -> dict[str, float]:
    """The differences by kind; fails where one is too large."""
    reference = load(folder, CELLS["reference"][list(TERMS).index(cell.objective)], 1)
    found = {kind: difference(load(folder, cell, ranks), reference, kind, cell.precision) for kind in KINDS}
    for kind, value in found.items():
        assert value <= (FP32 if cell.precision == "fp32" else BF16[kind]), (
            f"{cell.name} on {ranks}: {kind} {value:.1e}"
        )
    return found


@pytest.mark.parametrize("cell", CELLS["some"], ids=lambda cell: cell.name)
def test_two_ranks_equal_one(some, cell):
    """fp32, two micro-batches, under every engine: two ranks differ from one by rounding alone."""
    check(some, cell, 2)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_table(tiny_teacher, tmp_path, capsys):
    """Every engine x objective x ranks x accumulation, in fp32 and, accumulated, in bf16; prints the differences.

    Four ranks without accumulation, in fp32: what they add to two is below what bf16 rounds.
    """
    launches = [
        (1, "fp32-x1"),
        (1, "fp32-x4"),
        (1, "bf16-x4"),
        (2, "fp32-x1"),
        (2, "fp32-x4"),
        (2, "bf16-x4"),
        (4, "fp32-x1"),
    ]
    for ranks, cells in launches:  # no process ever frees an engine: one launch for all would take too much memory
        compute(tmp_path, tiny_teacher, ranks, cells)
    lines = [f"{'gradients / parameters after 5 steps':36}" + "".join(f"{f'{ranks} ranks':>20}" for ranks in RANKS)]
    for precision, objective, engine, accumulate in itertools.product(PRECISIONS, TERMS, ENGINES, ACCUMULATE):
        cell = Cell(engine, accumulate, objective, precision)
        on = [ranks for ranks in RANKS if (ranks, f"{precision}-x{accumulate}") in launches]
        cells = [check(tmp_path, cell, ranks) for ranks in on]
        row = f"{precision} {objective:8} {engine:6} accumulate {accumulate}"
        lines.append(f"{row:36}" + "".join(f"{c['gradient']:>11.1e} {c['parameter']:.1e}" for c in cells))
    with capsys.disabled():
        print("", *lines, sep="\n")
