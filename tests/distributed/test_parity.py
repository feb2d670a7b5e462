"""W ranks with b rows each are one rank with W * b: loss, gradients, parameters after 5 steps, under every engine."""

import sys

import pytest
import torch
from conftest import run_process
from distributed import parity_worker
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed

WORKER = parity_worker.__file__
GLOBAL_BATCH = 8
ENGINES = ["zero1", "zero2", "zero3", "ddp"]


@pytest.fixture(scope="module")
def results(tiny_teacher, tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    """engine -> what it computed; `plain` is one process without any engine, the others are two ranks."""
    folder = tmp_path_factory.mktemp("parity")
    run_process([sys.executable, WORKER, str(folder / "plain"), str(tiny_teacher), str(GLOBAL_BATCH), "plain"])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for engine in ENGINES:
        run_process([*launcher, WORKER, str(folder / engine), str(tiny_teacher), str(GLOBAL_BATCH), engine])
    return {engine: load_file(folder / engine) for engine in ("plain", *ENGINES)}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("what", ["loss", "grad_norm", "gradient", "parameter"])
def test_two_ranks_equal_one(results, engine, what):
    """fp32: two ranks differ from one by rounding alone."""
    ours, plain = results[engine], results["plain"]
    names = [name for name in plain if name.startswith(f"{what}.")]
    assert names
    assert set(names) == {name for name in ours if name.startswith(f"{what}.")}
    for name in names:
        size = plain[name].abs().max().item()
        torch.testing.assert_close(
            ours[name], plain[name], rtol=1e-5, atol=1e-5 * size, msg=lambda m, n=name: f"{n}: {m}"
        )
