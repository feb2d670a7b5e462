"""LAMB over two ranks is LAMB over whole parameters in one process, under every engine."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import run_process
from distributed import lamb_worker
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.distributed

STEPS = 5
TWO_RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def run(folder: Path, *jobs: str, ranks: int = 2) -> list[dict[str, Tensor]]:
    """What lamb_worker.py saved of each job, all of them in one launch."""
    launcher = [] if ranks == 1 else TWO_RANKS
    run_process([sys.executable, *launcher, lamb_worker.__file__, str(folder), *jobs])
    return [load_file(folder / f"{job.partition(',')[0]}.safetensors") for job in jobs]


def assert_equal_but_for_rounding(ours: dict[str, Tensor], plain: dict[str, Tensor], job: str) -> None:
    """fp32: every tensor within 1e-5 of its largest element."""
    assert ours.keys() == plain.keys()
    assert ours["step"] == plain["step"] == STEPS
    for name, expected in plain.items():
        size = expected.abs().max().item()
        torch.testing.assert_close(
            ours[name], expected, rtol=0, atol=1e-5 * size, msg=lambda m, n=name: f"{job} {n}: {m}"
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("lamb")


@pytest.fixture(scope="module")
def plain(folder) -> dict[str, Tensor]:
    """Five steps of one process without an engine."""
    (result,) = run(folder, f"plain,plain,0,{STEPS}", ranks=1)
    return result


@pytest.mark.parametrize(
    "engines",
    [["zero2"], pytest.param(["ddp", "zero1", "zero3", "zero3_offload", "fsdp2"], marks=pytest.mark.slow)],
    ids=" ".join,
)
def test_two_ranks_equal_one(folder, plain, engines):
    """Weights, moments and step count after five steps."""
    found = run(folder, *(f"{engine},{engine},0,{STEPS}" for engine in engines))
    for engine, ours in zip(engines, found, strict=True):
        assert_equal_but_for_rounding(ours, plain, engine)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("zero2", "plain"), ("plain", "zero3")])
def test_resume_under_another_engine(folder, plain, before, after):
    """Three steps under one engine, the other two under another: the five steps of one process."""
    ranks = {"plain": 1}
    run(folder, f"{before}_3,{before},0,3", ranks=ranks.get(before, 2))
    job = f"{before}_{after},{after},3,{STEPS},{before}_3"
    assert_equal_but_for_rounding(*run(folder, job, ranks=ranks.get(after, 2)), plain, job)
