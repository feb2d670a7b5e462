"""The objective on real gloo ranks: W ranks with b rows each give what one rank gives with W * b.

Run by torchrun, this same file is what each rank does: `test_objective.py FOLDER` leaves rank{r}.pt there, and
`test_objective.py golden` compares with the reference's numbers for as many ranks.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kd_accel import distributed
from kd_accel.config import ObjectiveConfig
from kd_accel.objective import NonFiniteLoss, Objective
from kd_accel.schedules import Progress
from kd_accel.schema import validate

pytestmark = pytest.mark.distributed

B, D, D_TEACHER = 12, 6, 5  # 12 rows split over 2 and over 4 ranks
TERMS = {
    "clip": {"kind": "clip", "weight": 0.7},
    "siglip": {"kind": "siglip", "weight": 0.3},
    "feature": {"kind": "feature_mse", "weight": 20.0, "confidence": True},
    "feature_sum": {"kind": "feature_mse", "weight": 1.3, "reduction": "sum", "confidence": "var"},
    "kl": {"kind": "logit_kl", "weight": 0.9, "confidence": "var_shifted"},
    "kl_soft": {"kind": "logit_kl", "weight": 1.1, "teacher_temperature": 0.2},
    "icl": {"kind": "interactive_contrastive", "weight": 0.6, "confidence": "var"},
    "icl_own": {"kind": "interactive_contrastive", "weight": 1.7, "scale": "own"},
}
CASES = {name: {name: term} for name, term in TERMS.items()} | {"all": TERMS}
DTYPES = {torch.float64: {"rtol": 1e-12, "atol": 1e-12}, torch.float32: {"rtol": 1e-5, "atol": 2e-6}}


def _features(dtype: torch.dtype) -> tuple[dict, dict]:
    """(student, teacher) of all ranks, alike wherever it is called."""
    seeded = torch.Generator().manual_seed(3)
    widths = {"image": D, "text": D, "projected_image": D_TEACHER, "projected_text": D_TEACHER}
    student = {name: torch.randn(B, width, generator=seeded).to(dtype) for name, width in widths.items()}
    teacher = {name: torch.randn(B, D_TEACHER, generator=seeded).to(dtype) for name in ("image", "text")}
    return student, teacher


def _own_rows() -> slice:
    rows = B // distributed.world_size()
    return slice(distributed.rank() * rows, (distributed.rank() + 1) * rows)


def _run(case: str, dtype: torch.dtype, chunk_rows: int, log_scale: float | None = None) -> dict[str, dict]:
    """What this rank's rows give: numbers alike on all ranks, and the gradients of its own features."""
    values = {"terms": CASES[case], "logit_bias": -4.0, "chunk_rows": chunk_rows, "temperature": {"init": 0.2}}
    objective = Objective(validate(ObjectiveConfig, values), teacher_scale=30.0).to(dtype)
    if log_scale is not None:
        with torch.no_grad():
            objective.log_scale.fill_(log_scale)
    own = _own_rows()
    student, teacher = ({name: f[own] for name, f in features.items()} for features in _features(dtype))
    outcome = objective(student, teacher, Progress())
    parameters = {f"d {name}": parameter.grad for name, parameter in objective.named_parameters()}
    return {"alike": {"loss": outcome.loss, **outcome.metrics, **parameters}, "rows": outcome.gradients}


def _all_runs(chunk_rows: int) -> dict[str, dict]:
    runs = {f"{case} {dtype}": _run(case, dtype, chunk_rows) for case in CASES for dtype in DTYPES}
    # At the end of the temperature's range, where a gradient that points outward is blocked.
    return runs | {f"end {dtype}": _run("all", dtype, chunk_rows, log_scale=0.0) for dtype in DTYPES}


def _complaint() -> str:
    """What NonFiniteLoss says on this rank when the last rank's captions hold a nan."""
    student, teacher = _features(torch.float32)
    student["text"][-1, 0] = torch.nan
    config = validate(ObjectiveConfig, {"terms": {"clip": {"kind": "clip"}, "feature": {"kind": "feature_mse"}}})
    own = _own_rows()
    with pytest.raises(NonFiniteLoss) as error:
        Objective(config)({n: f[own] for n, f in student.items()}, {n: f[own] for n, f in teacher.items()}, Progress())
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
    """Loss, metrics, gradients of scales and bias, every rank's feature gradients: for each term and all together."""
    ranks = _launch(run_ranks, tmp_path_factory.getbasetemp(), world_size)
    for name, one in _all_runs(chunk_rows=B).items():
        tolerance = next(t for dtype, t in DTYPES.items() if str(dtype) in name)
        for rank in ranks:
            _assert_close(rank["runs"][name]["alike"], one["alike"], name, tolerance)
        rows = {key: torch.cat([rank["runs"][name]["rows"][key] for rank in ranks]) for key in one["rows"]}
        _assert_close(rows, one["rows"], name, tolerance)


def _assert_close(actual: dict, expected: dict, name: str, tolerance: dict) -> None:
    torch.testing.assert_close(actual, expected, **tolerance, msg=lambda text: f"{name}: {text}")


def test_a_nan_on_one_rank_stops_all(run_ranks, tmp_path_factory):
    """Every rank raises the same NonFiniteLoss, which names the term and the rank that the nan came from."""
    first, second = (rank["complaint"] for rank in _launch(run_ranks, tmp_path_factory.getbasetemp(), 2))
    assert first == second == "loss/clip is not finite; not finite on arrival: student text on rank 1"


def test_golden_numbers_of_as_many_ranks(run_ranks, golden_root):
    """The reference's numbers for W ranks come out of W ranks, each with its own rows."""
    worlds = {json.loads(path.read_text()).get("world_size", 1) for path in golden_root.glob("*.json")} - {1}
    if not worlds:
        pytest.skip("no golden file is of more than one rank")
    for world_size in worlds:
        run_ranks([__file__, "golden"], world_size)


def _check_golden() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "losses"))
    import test_golden

    for path, dtype in (case.values for case in test_golden.CASES.args[1]):
        golden = test_golden.Golden(path, dtype)
        if golden.world_size == distributed.world_size():
            _check_parts(test_golden, golden)


def _check_parts(test_golden, golden) -> None:
    rows = len(golden["in.image"]) // distributed.world_size()
    own = slice(distributed.rank() * rows, (distributed.rank() + 1) * rows)
    for part in test_golden.parts(golden):
        loss, gradients = test_golden.through_objective(golden, part, chunk_rows=3, rows=own)
        golden.assert_close(loss + part.plus, golden[part.value], part.value)
        for name, expected in test_golden.expected_of_objective(golden, part).items():
            actual = gradients[name]
            if "proj." in name:  # projectors are the student's: it is the trainer who sums these over ranks
                (actual,) = distributed.sum_over_ranks([actual])
            expected = expected[own] if name in ("image", "text") else expected
            golden.assert_close(actual, expected, f"{part.gradient}.{name}")


def _main(job: str) -> None:
    dist.init_process_group("gloo")
    if job == "golden":
        _check_golden()
    else:
        torch.save(
            {"runs": _all_runs(chunk_rows=2), "complaint": _complaint()}, Path(job) / f"rank{distributed.rank()}.pt"
        )
    distributed.end_process(0)


if __name__ == "__main__":
    _main(sys.argv[1])
