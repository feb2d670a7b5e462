"""Schedules against their formulas, at the start, in the middle, at the end and beyond."""

from __future__ import annotations

import math

import pytest

from kd_accel.config_files import load
from kd_accel.schedules import (
    Constant,
    Cosine,
    Linear,
    Piecewise,
    Progress,
    Scheduled,
    StepBelow,
    StepEvery,
    bounds,
    value_at,
    warmup_constant,
    warmup_cosine,
)
from kd_accel.schema import ConfigError, Schema


class Holder(Schema):
    weight: Scheduled = 1.0


def test_a_number_and_a_constant_never_move():
    for progress in (Progress(), Progress(step=10**6, epoch=99.0, samples=10**9, temperature=0.01)):
        assert value_at(2.5, progress) == 2.5
        assert value_at(Constant(value=2.5), progress) == 2.5


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0, 1.5])
def test_linear_is_a_straight_line_that_ends(share):
    schedule = Linear(start=3.0, end=-1.0, steps=200)
    expected = 3.0 + (-1.0 - 3.0) * min(share, 1.0)
    assert value_at(schedule, Progress(step=round(200 * share))) == pytest.approx(expected)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0, 1.5])
def test_cosine_is_half_a_period(share):
    """The mean of start and end plus half their distance times cos(pi t): FastCLIP's gamma from 1.0 to 0.9."""
    schedule = Cosine(start=1.0, end=0.9, epochs=10)
    expected = (1.0 + 0.9) / 2 + (1.0 - 0.9) / 2 * math.cos(math.pi * min(share, 1.0))
    assert value_at(schedule, Progress(epoch=10 * share)) == pytest.approx(expected)


@pytest.mark.parametrize("length", ["steps", "epochs", "samples"])
def test_a_ramp_reads_only_the_clock_of_its_length(length):
    """Half of the named clock gives the middle, wherever the other clocks stand."""
    clocks = {"step": 9999, "epoch": 9999.0, "samples": 9999} | {
        {"steps": "step", "epochs": "epoch"}.get(length, length): 5
    }
    assert value_at(Linear(start=0.0, end=1.0, **{length: 10}), Progress(**clocks)) == 0.5


@pytest.mark.parametrize(("temperature", "factor"), [(0.0301, 1.0), (0.03, 1 / 3), (0.01, 1 / 3), (0.07, 1.0)])
def test_step_below_falls_at_the_threshold(temperature, factor):
    """FastCLIP's learning rate of the temperature: a third of it once the temperature is at most 0.03."""
    schedule = StepBelow(value=7.8125e-5, threshold=0.03, ratio=1 / 3)
    assert value_at(schedule, Progress(temperature=temperature)) == pytest.approx(7.8125e-5 * factor)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("2", 2.0),
        ("{kind: constant, value: 2}", Constant(value=2.0)),
        ("{kind: linear, start: 0, end: 1, steps: 3}", Linear(start=0.0, end=1.0, steps=3)),
        ("{kind: cosine, start: 0, end: 1, epochs: 0.5}", Cosine(start=0.0, end=1.0, epochs=0.5)),
        ("{kind: step_below, value: 1, threshold: 0.1, ratio: 2}", StepBelow(value=1.0, threshold=0.1, ratio=2.0)),
    ],
)
def test_a_config_takes_a_number_or_a_schedule(given, expected):
    assert load(Holder, [], [f"weight={given}"]).weight == expected


@pytest.mark.parametrize("given", [{}, {"steps": 3, "samples": 4}])
def test_a_ramp_has_exactly_one_length(given):
    with pytest.raises(ConfigError, match=f"exactly one of steps, epochs, samples, not {len(given)}"):
        load(Holder, weight={"kind": "linear", "start": 0, "end": 1, **given})


def test_warmup_cosine_matches_a_loop():
    """A loop that adds one warm-up increment per step, then walks the angle of the cosine from 0 to pi."""
    lr, min_lr, warmup, total = 3e-4, 1e-5, 7, 50
    rising, angle = 0.0, 0.0
    for step in range(total):
        if step < warmup:
            rising += lr / warmup
            expected = rising
        else:
            expected = min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(angle))
            angle += math.pi / (total - warmup)
        found = warmup_cosine(step, lr=lr, min_lr=min_lr, warmup_steps=warmup, total_steps=total)
        assert found == pytest.approx(expected, rel=1e-12)


def test_warmup_cosine_at_its_corners():
    """The peak at the end of the warm-up, the floor at and after the end; a run may be all warm-up or have none."""

    def lr_at(step: int, *, warmup_steps: int = 10) -> float:
        return warmup_cosine(step, lr=1.0, min_lr=0.25, warmup_steps=warmup_steps, total_steps=30)

    assert lr_at(0) == pytest.approx(1 / 10)
    assert lr_at(9) == lr_at(10) == 1.0
    assert lr_at(20) == pytest.approx((1.0 + 0.25) / 2)
    assert lr_at(30) == lr_at(1000) == pytest.approx(0.25)
    assert lr_at(0, warmup_steps=0) == 1.0
    assert lr_at(29, warmup_steps=30) == 1.0


def test_step_every_takes_a_step_per_so_many_epochs():
    """torch's StepLR: the ratio once more after every 10 epochs, not in between."""
    schedule = StepEvery(value=8.0, ratio=0.5, epochs=10)
    at = {0.0: 8.0, 9.99: 8.0, 10.0: 4.0, 19.5: 4.0, 35.0: 1.0}
    assert {epoch: value_at(schedule, Progress(epoch=epoch)) for epoch in at} == at


def test_piecewise_changes_at_its_epochs():
    """values[i] from epochs[i - 1] on."""
    schedule = Piecewise(values=[4, 2, 1], epochs=[1, 101])
    at = {0.0: 4, 0.99: 4, 1.0: 2, 100.9: 2, 101.0: 1, 500.0: 1}
    assert {epoch: value_at(schedule, Progress(epoch=epoch)) for epoch in at} == at


@pytest.mark.parametrize("epochs", ["[1]", "[5, 1]", "[1, 1]"])
def test_piecewise_needs_rising_epochs_one_fewer_than_values(epochs):
    with pytest.raises(ConfigError, match="3 values need 2 rising epochs"):
        load(Holder, overrides=[f"weight={{kind: piecewise, values: [1, 2, 3], epochs: {epochs}}}"])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (0.5, (0.5, 0.5)),
        (Constant(value=2), (2, 2)),
        (Linear(start=3, end=-1, steps=2), (-1, 3)),
        (Cosine(start=0.2, end=1, steps=2), (0.2, 1)),
        (StepBelow(value=6, threshold=0.03, ratio=0.5), (3, 6)),
        (StepEvery(value=6, ratio=0.5, epochs=1), (0, 6)),
        (StepEvery(value=6, ratio=2, epochs=1), (6, math.inf)),
        (StepEvery(value=6, ratio=1, epochs=1), (6, 6)),
        (Piecewise(values=[4, 2, 7], epochs=[1, 2]), (2, 7)),
    ],
)
def test_bounds_are_the_lowest_and_highest_value(schedule, expected):
    assert bounds(schedule) == expected


def test_cooldown_ends_at_the_least_rate():
    """Warm-up, a constant rate, and the last steps down a power of what is left of them."""
    options = {"lr": 1.0, "min_lr": 0.2, "warmup_steps": 2, "total_steps": 10, "cooldown_steps": 4, "power": 2.0}
    rates = [warmup_constant(step, **options) for step in range(11)]
    assert rates[:7] == [0.5] + [1.0] * 6
    assert rates[6:] == pytest.approx([0.2 + 0.8 * (left / 4) ** 2 for left in (4, 3, 2, 1, 0)])
