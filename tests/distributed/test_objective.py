"""The objective on real gloo ranks: W ranks with b rows each give what one rank gives with W * b.

Run by torchrun, this same file is what each rank does: `test_objective.py FOLDER` leaves rank{r}.pt there, and
`test_objective.py golden` compares with the reference's numbers for as many ranks.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import every_term
import pytest
import torch
import torch.distributed as dist
from every_term import TERMS, B

from kd_accel import distributed, processes
from kd_accel.memory import SampleMemory
from kd_accel.objective import NonFiniteLoss, Objective
from kd_accel.schedules import Progress

pytestmark = pytest.mark.distributed

CASES = {name: [name] for name in TERMS} | {"all": [name for name in TERMS if "reference" not in TERMS[name]]}
BY_ID = ["all", *(name for name in TERMS if name.startswith("gcl_published"))]  # between them, every column there is
STEPS = 3
DTYPES = {torch.float64: {"rtol": 1e-10, "atol": 1e-12}, torch.float32: {"rtol": 1e-4, "atol": 1e-5}}


def _run(
    case: str, dtype: torch.dtype, chunk_rows: int, *, log_scale: float | None = None, memory: str = "replicated"
) -> dict[str, dict]:
    """Steps of this rank's rows: what is alike on all ranks, memory at the end included, and its own gradients."""
    options = {"chunk_rows": chunk_rows, "temperature": {"init": 0.2}, "memory": memory}
    objective = every_term.objective(CASES[case], dtype=dtype, **options)
    if log_scale is not None:
        with torch.no_grad():
            objective.log_scale.fill_(log_scale)
    alike, rows = {}, {}
    for step in range(STEPS if dtype == torch.float64 else 1):
        given = every_term.rows_of(every_term.features(step, dtype), _rows_of(B))
        progress = Progress(step=step, epoch=0.7 * step)  # gamma is 1 in the first epoch
        outcome = every_term.call(objective, given, progress)
        alike |= {f"{step} {key}": v for key, v in {"loss": outcome.loss, **outcome.metrics}.items()}
        alike |= {f"{step} {key}": gradient for key, gradient in every_term.own_gradients(objective).items()}
        rows |= {f"{step} {name}": gradient for name, gradient in outcome.gradients.items()}
        objective.step(progress, lr=0.01, temperature_lr=0.02)
    if dtype == torch.float64:
        alike |= objective.state() | _remembered(objective)
    return {"alike": alike, "rows": rows}


def _remembered(objective: Objective) -> dict[str, torch.Tensor]:
    """Of all N samples, by name."""
    memories = {name: module for name, module in objective.named_modules() if isinstance(module, SampleMemory)}
    return {
        f"{name}.{column}": rows
        for name, memory in memories.items()
        for column, rows in memory.read(torch.arange(every_term.N)).items()
    }


@functools.cache
def _all_runs(chunk_rows: int) -> dict[str, dict]:
    runs = {f"{case} {dtype}": _run(case, dtype, chunk_rows) for case in CASES for dtype in DTYPES}
    # At the end of the temperature's range, where a gradient that points outward is blocked.
    ends = {f"end {dtype}": _run("all", dtype, chunk_rows, log_scale=0.0) for dtype in DTYPES}
    return runs | ends


def _complaint() -> str:
    """What NonFiniteLoss says on this rank when the last rank's captions hold a nan."""
    given = every_term.features()
    given["student"]["text"][-1, 0] = torch.nan
    with pytest.raises(NonFiniteLoss) as error:
        every_term.call(every_term.objective(["clip", "kl"]), every_term.rows_of(given, _rows_of(B)), Progress())
    return str(error.value)


@functools.cache  # starting processes takes longer than all that they do
def _launch(run_ranks, folder: Path, world_size: int) -> list[dict]:
    """What `world_size` ranks wrote."""
    folder = folder / f"objective_on_{world_size}_ranks"
    folder.mkdir()
    run_ranks([__file__, folder], world_size)
    return [torch.load(folder / f"rank{r}.pt") for r in range(world_size)]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_are_one_rank(world_size, run_ranks, tmp_path_factory):
    """For each term and all together: loss, metrics, gradients of all that is learned here and of the features, in each
    of three steps; and after them everything learned and remembered."""
    ranks = _launch(run_ranks, tmp_path_factory.getbasetemp(), world_size)
    for name, one in _all_runs(chunk_rows=B).items():
        tolerance = next(t for dtype, t in DTYPES.items() if str(dtype) in name)
        for rank in ranks:
            _assert_close(rank["runs"][name]["alike"], one["alike"], name, tolerance)
        rows = {key: torch.cat([rank["runs"][name]["rows"][key] for rank in ranks]) for key in one["rows"]}
        _assert_close(rows, one["rows"], name, tolerance)


def _assert_close(actual: dict, expected: dict, name: str, tolerance: dict) -> None:
    torch.testing.assert_close(actual, expected, **tolerance, equal_nan=True, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("world_size", [2, 4])
def test_sharded_memory_changes_nothing(world_size, run_ranks, tmp_path_factory):
    """Each rank remembers its share of the samples: on as many ranks, the very numbers of a replicated memory; and up
    to rounding, those of one process."""
    ranks = _launch(run_ranks, tmp_path_factory.getbasetemp(), world_size)
    for case in BY_ID:
        name = f"{case} {torch.float64}"
        one = _all_runs(chunk_rows=B)[name]
        for rank in ranks:
            _assert_close(rank["sharded"][case], rank["runs"][name], name, {"rtol": 0, "atol": 0})
            _assert_close(rank["sharded"][case]["alike"], one["alike"], name, DTYPES[torch.float64])
        rows = {key: torch.cat([rank["sharded"][case]["rows"][key] for rank in ranks]) for key in one["rows"]}
        _assert_close(rows, one["rows"], name, DTYPES[torch.float64])


def test_a_nan_on_one_rank_stops_all(run_ranks, tmp_path_factory):
    """Every rank raises the same NonFiniteLoss, which names the term, and the rank and sample of the nan."""
    first, second = (rank["complaint"] for rank in _launch(run_ranks, tmp_path_factory.getbasetemp(), 2))
    where = f"student text on rank 1 (sample ids {every_term.features()['ids'][-1]})"
    assert first == second == f"loss/clip, loss/kl is not finite; not finite on arrival: {where}"


def test_golden_numbers_on_two_ranks(run_ranks, golden_root):
    """The references' numbers come out of two ranks, each with its own rows."""
    run_ranks([__file__, "golden"], 2)


def _check_golden() -> None:
    """Every file, however many ranks the reference had: the loss and its gradients are the same on any number."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "losses"))
    import golden_recall
    import golden_steps
    import test_golden
    import test_golden_optim

    for path, dtype in (case.values for case in test_golden.CASES.args[1]):
        golden = test_golden.Golden(path, dtype)
        if golden.rows % distributed.world_size() == 0:
            for part in test_golden.parts(golden):
                test_golden.check_part(golden, part, chunk_rows=3, rows=_rows_of(golden.rows))
    for path, dtype in golden_steps.cases():
        file = golden_steps.StepFile(path, dtype)
        golden_steps.replay(file, chunk_rows=3, rows=_rows_of(len(file.step(0)["in.idx"])))
    for case in test_golden.recall_cases():
        golden_recall.check(*case, chunk_rows=3, rows=_rows_of(test_golden.Golden(*case).rows))
    for case in test_golden_optim.files_of("e2e"):
        test_golden_optim.end_to_end(case.values[0])


def _rows_of(total: int) -> slice:
    """This rank's rows of a global batch."""
    b = total // distributed.world_size()
    return slice(distributed.rank() * b, (distributed.rank() + 1) * b)


def _main(job: str) -> None:
    dist.init_process_group("gloo")
    if job == "golden":
        _check_golden()
    else:
        sharded = {case: _run(case, torch.float64, chunk_rows=2, memory="sharded") for case in BY_ID}
        found = {"runs": _all_runs(chunk_rows=2), "sharded": sharded, "complaint": _complaint()}
        torch.save(found, Path(job) / f"rank{distributed.rank()}.pt")
    processes.end_process(0)


if __name__ == "__main__":
    _main(sys.argv[1])
