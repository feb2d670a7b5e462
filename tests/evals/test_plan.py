"""What there is to do, and what cannot be done for missing data."""

from __future__ import annotations

from kd_accel.eval_config import MeasureConfig
from kd_accel.evals.plan import make_plan
from kd_accel.probe_config import ProbeConfig


def test_a_probe_without_training_images_is_skipped_and_said(tmp_path, write_benchmark, labelled, captioned):
    """The set is classified all the same; of captions nobody asks for a probe."""
    things = write_benchmark(tmp_path / "sets" / "things", labelled([0, 1]), num_classes=2)
    write_benchmark(tmp_path / "sets" / "pairs", captioned([1]))
    plan = make_plan(MeasureConfig(data=str(tmp_path / "sets"), probe=ProbeConfig()))
    assert [(job.key, job.measures) for job in plan.jobs] == [("pairs", ("retrieval",)), ("things", ("zero_shot",))]
    assert list(plan.skipped) == ["things, linear_probe"]
    assert str(things) in plan.skipped["things, linear_probe"]
    assert not make_plan(MeasureConfig(data=str(tmp_path / "sets"))).skipped
