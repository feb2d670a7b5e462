"""The student's temperature: held in [min, 1] without winding up, stepped by the objective itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kd_accel.config import ObjectiveConfig
from kd_accel.objective import Objective
from kd_accel.schedules import Progress
from kd_accel.schema import validate

MIN = 0.5  # soft enough that no probability is 1 in fp32, so that no gradient is zero by rounding


def _alike(b: int = 7) -> dict[str, Tensor]:
    """Features whose partners are equal and whose strangers are orthogonal: a sharper softmax lowers the loss."""
    return {"image": torch.eye(b), "text": torch.eye(b)}


def _swapped(b: int = 7) -> dict[str, Tensor]:
    """Every caption belongs to another image: a softer softmax lowers the loss."""
    return {"image": torch.eye(b), "text": torch.eye(b).roll(1, dims=0)}


def _clip(**temperature) -> Objective:
    """Nothing but InfoNCE and its temperature."""
    return Objective(validate(ObjectiveConfig, {"terms": {"clip": {"kind": "clip"}}, "temperature": temperature}))


@pytest.mark.parametrize(("init", "features"), [(MIN, _alike), (1.0, _swapped)])
def test_temperature_is_held_where_the_loss_pulls_it_out(init, features):
    """At an end of [min, 1] a gradient that points outward is zero."""
    objective = _clip(init=init, min=MIN)
    objective(features(), {}, Progress())
    assert objective.log_scale.grad == 0


@pytest.mark.parametrize(("init", "features", "sign"), [(MIN, _swapped, 1), (1.0, _alike, -1)])
def test_temperature_may_come_back_in(init, features, sign):
    """At an end of [min, 1] a gradient that points inward passes."""
    objective = _clip(init=init, min=MIN)
    objective(features(), {}, Progress())
    assert objective.log_scale.grad * sign > 0


@pytest.mark.parametrize(("beyond", "end"), [(3 - math.log(MIN), MIN), (-3.0, 1.0)])
def test_losses_never_see_a_temperature_outside(beyond, end):
    """A parameter that momentum carried out of [min, 1] counts as the end it passed."""
    objective, student = _clip(init=end, min=MIN), _swapped()
    at_end = objective(student, {}, Progress())
    with torch.no_grad():
        objective.log_scale.fill_(beyond)
    torch.testing.assert_close(objective(student, {}, Progress()).loss, at_end.loss)
    assert objective.temperature == pytest.approx(end)


def test_temperature_does_not_wind_up():
    """After 200 steps that push it out it is back inside soon.

    Held at the end, AdamW's momentum still carries it lr * sum_k (0.9 / sqrt(0.98))^k = 10 lr further; on the way back
    no step is shorter than lr * 0.1 / sqrt(0.02 + 0.98^190) = lr / 2, so 21 steps are enough. Unheld it needs 100.
    """
    objective = _clip(init=0.6, min=MIN)
    for features, steps in ((_alike(), 200), (_swapped(), 21)):
        for _ in range(steps):
            objective(features, {}, Progress())
            objective.step(Progress(), lr=0.0, temperature_lr=0.05)
            assert objective.temperature >= MIN
    assert objective.temperature > MIN


def test_step_is_adamws():
    """The first step of AdamW is lr long, against the gradient, whatever the gradient's size."""
    objective = _clip(init=0.07)
    before = objective.log_scale.item()
    objective(_alike(), {}, Progress())
    objective.step(Progress(), lr=0.0, temperature_lr=0.125)
    assert objective.log_scale.item() == pytest.approx(before + 0.125, rel=1e-5)


def test_fixed_temperature_has_no_gradient_and_no_optimizer():
    """learnable=false keeps it at init."""
    objective = _clip(init=0.07, learnable=False)
    objective(_alike(), {}, Progress())
    objective.step(Progress(), lr=0.0, temperature_lr=1.0)
    assert objective.optimizer.adamw is None
    assert objective.log_scale.grad is None
    assert objective.temperature == pytest.approx(0.07)
