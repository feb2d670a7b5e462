"""`bench` measures the training that it is given, and leaves nothing behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from tiny import arch

from kd_accel.bench_config import BenchConfig
from kd_accel.cli import main
from kd_accel.plan.verb import make_plan
from kd_accel.plan_config import PlanConfig
from kd_accel.schema import validate
from kd_accel.timing import OTHER, SPANS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path, train_shards, tiny_teacher) -> Path:
    values = {
        "name": "run", "output_dir": str(tmp_path / "runs"), "precision": "fp32",
        "data": {"shards": str(train_shards), "batch_size": 8, "num_workers": 0},
        "student": {"arch": arch(), "projector": "linear"}, "teacher": {"path": str(tiny_teacher)},
        "objective": {"terms": {"feature": {"kind": "feature_mse"}}},
        "optim": {"lr": 1e-3, "epochs": 3},
    }  # fmt: skip
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def check(timing: dict, *, world_size: int) -> None:
    assert timing["world_size"] == world_size
    assert timing["global_batch"] == 8 * world_size
    absent = {"checkpoint"} | ({"gather"} if world_size == 1 else set())
    assert timing["seconds"].keys() == {*SPANS, OTHER} - absent
    assert sum(timing["seconds"].values()) == pytest.approx(timing["step_seconds"], rel=0.2)
    assert timing["samples_per_second"] == pytest.approx(timing["global_batch"] / timing["step_seconds"])
    assert 0 < timing["checkpoint_stall"] < timing["checkpoint_seconds"]


@pytest.mark.parametrize("given", ["data", "synthetic"])
def test_the_split_of_a_step(given, config, tmp_path, capsys):
    words = [str(config), f"input={given}", "warmup=1", "measured=3", f"output={tmp_path}/bench.json"]
    assert main(["bench", *words]) == 0
    timing = json.loads((tmp_path / "bench.json").read_text())
    check(timing, world_size=1)
    out = capsys.readouterr().out
    assert f"{timing['samples_per_second']:,.1f} samples/s" in out
    assert not list((tmp_path / "runs").glob("**/*"))
    # of the same FLOPs that `plan` counts
    plan = make_plan(validate(PlanConfig, yaml.safe_load(config.read_text()) | {"devices": "1xCPU"}))
    spent = timing["seconds"]["teacher"]
    assert timing["mfu"]["teacher"] == pytest.approx(plan.towers.teachers["teacher"] / spent / timing["peak_flops"])


def test_synthetic_input_needs_no_data(config, tmp_path):
    words = ["input=synthetic", "warmup=0", "measured=1", f"data.shards={tmp_path}/nowhere"]
    assert main(["bench", str(config), *words]) == 0
    assert main(["bench", str(config), *words, "input=data"]) == 2


def test_stored_features_are_made_up_too(config, tmp_path):
    store = tmp_path / "store"
    assert main(["embed", str(config), f"out={store}"]) == 0
    words = ["input=synthetic", "warmup=0", "measured=1", "teacher.placement=cached", f"teacher.store={store}"]
    assert main(["bench", str(config), "teacher.path=null", *words, f"output={tmp_path}/bench.json"]) == 0
    timing = json.loads((tmp_path / "bench.json").read_text())
    assert "teacher" not in timing["mfu"]


@pytest.mark.distributed
def test_two_processes(config, tmp_path, run_ranks):
    words = [str(config), "warmup=1", "measured=3", f"output={tmp_path}/bench.json"]
    run_ranks(["-m", "kd_accel", "bench", *words])
    check(json.loads((tmp_path / "bench.json").read_text()), world_size=2)


def test_length_and_folder_of_the_run_do_not_matter(config, tmp_path):
    (tmp_path / "runs/run").mkdir(parents=True)
    (tmp_path / "runs/run/metrics.jsonl").write_text("kept")
    assert main(["bench", str(config), "input=synthetic", "warmup=0", "measured=1"]) == 0
    assert (tmp_path / "runs/run/metrics.jsonl").read_text() == "kept"


def test_compare_finds_what_became_slower(tmp_path, capsys):
    sys.path.insert(0, str(ROOT / "tests/benchmarks"))
    try:
        import compare
    finally:
        sys.path.pop(0)
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    timing = {"samples_per_second": 100.0, "peak_memory": 1000, "seconds": {"student": 1.0, "other": 0.001}}
    old.write_text(json.dumps(timing))
    new.write_text(json.dumps(timing | {"samples_per_second": 91.0, "peak_memory": 1080}))
    assert compare.main([str(old), str(new)]) == 0
    new.write_text(json.dumps(timing | {"samples_per_second": 89.0}))
    assert compare.main([str(old), str(new)]) == 1
    assert "samples_per_second" in capsys.readouterr().out
    new.write_text(json.dumps(timing | {"peak_memory": 1200}))
    assert compare.main([str(old), str(new)]) == 1


def test_keys_of_training_are_those_of_bench(config):
    assert validate(BenchConfig, yaml.safe_load(config.read_text())).measured == 20
