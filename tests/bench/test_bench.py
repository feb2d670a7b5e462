"""`bench` measures the training that it is given, and leaves nothing behind."""

from __future__ import annotations

import importlib
import json
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
    assert timing["mfu"]["teacher"] == pytest.approx(plan.teachers.flops["teacher"] / spent / timing["peak_flops"])


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


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests/benchmarks")
    return importlib.import_module("compare")


@pytest.fixture
def compared(compare, tmp_path):
    """compare.py on two files' contents: what it ends with."""

    def run(old: object, new: object) -> int:
        files = [tmp_path / "old.json", tmp_path / "new.json"]
        for file, content in zip(files, (old, new), strict=True):
            file.write_text(json.dumps(content))
        return compare.main(list(map(str, files)))

    return run


def test_compare_finds_what_became_slower(compared, capsys):
    timing = {"samples_per_second": 100.0, "peak_memory": 1000, "seconds": {"student": 1.0, "other": 0.001}}
    assert compared(timing, timing | {"samples_per_second": 91.0, "peak_memory": 1080}) == 0
    assert compared(timing, timing | {"samples_per_second": 89.0}) == 1
    assert "samples_per_second" in capsys.readouterr().out
    assert compared(timing, timing | {"peak_memory": 1200}) == 1


@pytest.mark.parametrize(
    ("name", "worse"),
    [("seconds", 1.2), ("peak_bytes", 1.2), ("grown_mib", 1.2), ("speedup", 0.8), ("core_per_second", 0.8)],
)
def test_compare_reads_nested_figures_whose_names_say_what_is_better(compared, capsys, name, worse):
    def figures(value: float) -> dict:
        return {"2048": {"clip, chunked": {name: value, "rows": 10 * value}}, "device": "cpu", "runs": [{name: 1.0}]}

    assert compared(figures(1.0), figures(worse)) == 1
    assert capsys.readouterr().out.count("WORSE") == 1  # `rows` says nothing of better
    assert compared(figures(1.0), figures(1 / worse)) == 0


def test_compare_misses_a_figure_that_is_gone(compared, capsys):
    assert compared({"seconds": 1.0, "bytes": 5}, {"seconds": 1.0}) == 1
    assert "missing" in capsys.readouterr().out


def test_compare_refuses_files_without_figures(compared):
    assert compared({"seconds": {"student": 1.0}}, {}) == 2


def test_keys_of_training_are_those_of_bench(config):
    assert validate(BenchConfig, yaml.safe_load(config.read_text())).measured == 20
