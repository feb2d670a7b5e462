"""LAMB over two ranks is LAMB over whole parameters in one process, under every engine."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import run_process
from distributed import lamb_worker
from marks import slow_but
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.distributed

ENGINES = ["ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3_offload"]
STEPS = 5
TWO_RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def run(folder: Path, out: str, engine: str, first: int, last: int, *state: str) -> dict[str, Tensor]:
    """What the worker saved in `folder` as `out`; `state` names what it is to start from."""
    paths = [str(folder / name) for name in (out, *state)]
    words = [lamb_worker.__file__, paths[0], engine, str(first), str(last), *paths[1:]]
    run_process([sys.executable, *([] if engine == "plain" else TWO_RANKS), *words])
    return load_file(paths[0])


def assert_equal_but_for_rounding(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    """fp32: every tensor within 1e-5 of its largest element."""
    assert ours.keys() == plain.keys()
    assert ours["step"] == plain["step"] == STEPS
    for name, expected in plain.items():
        size = expected.abs().max().item()
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=1e-5 * size, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("lamb")


@pytest.fixture(scope="module")
def plain(folder) -> dict[str, Tensor]:
    """Five steps of one process without an engine."""
    return run(folder, "plain", "plain", 0, STEPS)


@pytest.mark.parametrize("engine", slow_but(["zero2"], ENGINES))
def test_two_ranks_equal_one(folder, plain, engine):
    """Weights, moments and step count after five steps."""
    assert_equal_but_for_rounding(run(folder, engine, engine, 0, STEPS), plain)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("zero2", "plain"), ("plain", "zero3")])
def test_resume_under_another_engine(folder, plain, before, after):
    """Three steps under one engine, the other two under another: the five steps of one process."""
    run(folder, f"{before}_3", before, 0, 3)
    assert_equal_but_for_rounding(run(folder, f"{before}_{after}", after, 3, STEPS, f"{before}_3"), plain)
