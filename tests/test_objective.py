"""The objective in one process: against one independent graph, chunked and whole; the temperature has its own file.

b rows, d the student's width, d_teacher the teacher's.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kd_accel.config import ObjectiveConfig
from kd_accel.objective import NonFiniteLoss, Objective
from kd_accel.schedules import Progress
from kd_accel.schema import validate
from kd_accel.types import TeacherSpec

B, D, D_TEACHER, TEACHER_SCALE, BIAS = 7, 6, 5, 30.0, -4.0
TERMS = {  # every kind, every option, no two weights alike
    "clip": {"kind": "clip", "weight": 0.7},
    "siglip": {"kind": "siglip", "weight": 0.3},
    "feature": {"kind": "feature_mse", "weight": 20.0, "confidence": True},
    "feature_sum": {"kind": "feature_mse", "weight": 1.3, "reduction": "sum", "confidence": "var"},
    "kl": {"kind": "logit_kl", "weight": 0.9, "confidence": "var_shifted"},
    "kl_soft": {"kind": "logit_kl", "weight": 1.1, "teacher_temperature": 0.2},
    "icl": {"kind": "interactive_contrastive", "weight": 0.6, "confidence": "var"},
    "icl_own": {"kind": "interactive_contrastive", "weight": 1.7, "scale": "own"},
}


def _objective(terms: dict = TERMS, *, dtype: torch.dtype = torch.float64, **values) -> Objective:
    config = validate(ObjectiveConfig, {"terms": terms, "logit_bias": BIAS, **values})
    return Objective(config, teachers={"teacher": TeacherSpec(D_TEACHER, TEACHER_SCALE)}).to(dtype)


def _student(b: int = B, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Raw features of a student with projectors."""
    widths = {"image": D, "text": D, "projected_image": D_TEACHER, "projected_text": D_TEACHER}
    return {name: torch.randn(b, width, dtype=dtype) for name, width in widths.items()}


def _teacher(b: int = B, dtype: torch.dtype = torch.float64) -> dict[str, dict[str, Tensor]]:
    """Raw features of the one teacher, by its name."""
    return {"teacher": {name: torch.randn(b, D_TEACHER, dtype=dtype) for name in ("image", "text")}}


def _results(objective: Objective, student: dict, teacher: dict) -> dict[str, Tensor]:
    """Loss, metrics and every gradient of one call, by name."""
    outcome = objective(student, teacher, Progress())
    own = {f"d {name}": p.grad for name, p in objective.named_parameters()}
    return {"loss": outcome.loss, **outcome.metrics, **outcome.gradients, **own}


def _reference(student: dict, teacher: dict, log_scale: Tensor, own: Tensor, bias: Tensor) -> Tensor:
    """The same total as TERMS in one plain graph, written with torch's own losses."""
    image, text, p_image, p_text = (F.normalize(f, dim=1) for f in student.values())
    t_image, t_text = (F.normalize(f, dim=1) for f in teacher["teacher"].values())
    labels, scale = torch.arange(len(image)), log_scale.exp()
    logits, targets = scale * image @ text.T, t_image @ t_text.T

    def contrast(z_image, z_text):
        return (
            F.cross_entropy(z_image, labels, reduction="none") + F.cross_entropy(z_text, labels, reduction="none")
        ) / 2

    def divergence(q):
        pairs = ((logits, q), (logits.T, q.T))
        return sum(F.kl_div(z.log_softmax(1), t.softmax(1), reduction="none").sum(1) for z, t in pairs) / 2

    def cross(factor):
        return contrast(factor * p_image @ t_text.T, factor * p_text @ t_image.T)

    alpha = torch.exp(
        -torch.stack([F.cross_entropy(TEACHER_SCALE * z, labels, reduction="none") for z in (targets, targets.T)])
    )
    alpha = alpha.mean(0)
    signs = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    squares = [((a - b) ** 2).sum(1) for a, b in ((p_image, t_image), (p_text, t_text))]
    rows = (
        0.7 * contrast(logits, logits.T)
        - 0.3 * F.logsigmoid(signs * (logits + bias)).sum(1)
        + 20.0 * (1 + alpha) * sum(squares) / D_TEACHER
        + 1.3 * alpha * sum(squares) / 2
        + 0.9 * (1 + alpha) * divergence(TEACHER_SCALE * targets)
        + 1.1 * divergence(targets / 0.2)
        + 0.6 * alpha * cross(scale)
        + 1.7 * cross(own.exp())
    )
    return rows.mean()


def test_loss_and_gradients_are_those_of_one_plain_graph():
    """Loss, feature gradients (projectors' too) and gradients of scales and bias equal autograd's through one graph."""
    student, teacher, objective = _student(), _teacher(), _objective(chunk_rows=3)
    actual = _results(objective, student, teacher)
    leaves = {name: f.clone().requires_grad_() for name, f in student.items()}
    own = [
        p.detach().clone().requires_grad_()
        for p in (objective.log_scale, objective.own_log_scale["icl_own"], objective.logit_bias)
    ]
    loss = _reference(leaves, teacher, *own)
    loss.backward()
    torch.testing.assert_close(actual["loss"], loss.detach())
    for name, leaf in leaves.items():
        torch.testing.assert_close(actual[name], leaf.grad)
    for name, leaf in zip(("log_scale", "own_log_scale.icl_own", "logit_bias"), own, strict=True):
        torch.testing.assert_close(actual[f"d {name}"], leaf.grad)


@pytest.mark.parametrize("chunk_rows", [1, 3, B, B + 1])
def test_chunks_change_nothing(chunk_rows):
    """Loss, metrics and every gradient are those of the whole batch at once."""
    student, teacher = _student(), _teacher()
    whole = _results(_objective(chunk_rows=1000), student, teacher)
    torch.testing.assert_close(_results(_objective(chunk_rows=chunk_rows), student, teacher), whole)


@pytest.mark.parametrize("end", ["low", "high"])
def test_chunks_change_nothing_at_the_ends_of_the_temperature(end):
    """Whether the temperature's gradient points outward is asked of the whole batch, not of every chunk."""
    student, teacher = _student(), _teacher()
    ends = {"init": 0.5, "min": 0.5}  # soft enough that rows pull either way at both ends
    objectives = [_objective(chunk_rows=chunk_rows, temperature=ends) for chunk_rows in (1, 1000)]
    with torch.no_grad():
        for objective in objectives:
            for scale in (objective.log_scale, *objective.own_log_scale.values()):
                scale.fill_(0.0 if end == "low" else objective.max_log_scale)
    torch.testing.assert_close(*(_results(objective, student, teacher) for objective in objectives))


def test_total_is_the_weighted_sum_of_the_metrics():
    """loss/<term> is before the weight; loss adds weight * loss/<term>; confidence is a mean of numbers in (0, 1)."""
    outcome = _objective()(_student(), _teacher(), Progress())
    expected = sum(term["weight"] * outcome.metrics[f"loss/{name}"] for name, term in TERMS.items())
    torch.testing.assert_close(outcome.loss, expected)
    assert outcome.metrics.keys() == {f"loss/{name}" for name in TERMS} | {"confidence"}
    assert 0 < outcome.metrics["confidence"] < 1


def test_gradients_have_no_part_along_the_features():
    """Features are normalised inside, so their length has no effect."""
    student = _student()
    gradients = _objective()(student, _teacher(), Progress()).gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close((gradient * student[name]).sum(1), torch.zeros(B, dtype=torch.float64))


def test_callers_features_are_left_alone():
    """No graph reaches into the towers, and no gradient lands on what was handed in."""
    student = {name: f.requires_grad_() for name, f in _student().items()}
    outcome = _objective()(student, _teacher(), Progress())
    assert all(f.grad is None for f in student.values())
    assert not any(g.requires_grad for g in [outcome.loss, *outcome.metrics.values(), *outcome.gradients.values()])


def test_a_student_that_equals_its_teacher_has_nothing_to_learn():
    """With the teacher's features and scale, KL and MSE are zero and so are their gradients."""
    teacher = _teacher()
    terms = {"kl": {"kind": "logit_kl"}, "feature": {"kind": "feature_mse"}}
    objective = _objective(terms, temperature={"init": 1 / TEACHER_SCALE})
    with torch.no_grad():
        objective.log_scale.fill_(math.log(TEACHER_SCALE))  # exactly: 1 / scale was rounded to fp32
    outcome = objective(teacher["teacher"], teacher, Progress())
    for value in (outcome.loss, *outcome.gradients.values(), objective.log_scale.grad):
        torch.testing.assert_close(value, torch.zeros_like(value))


def test_without_a_teacher():
    """clip and siglip need none."""
    student = {name: f for name, f in _student().items() if name in ("image", "text")}
    outcome = _objective({"clip": {"kind": "clip"}, "siglip": {"kind": "siglip"}})(student, {}, Progress())
    assert outcome.metrics.keys() == {"loss/clip", "loss/siglip"}
    assert outcome.gradients.keys() == student.keys()


@pytest.mark.parametrize("kind", ["feature_mse", "logit_kl", "interactive_contrastive"])
def test_confidence_weighs_each_sample_by_its_own(kind):
    """mean_i (1 + alpha_i) l_i, which is not mean(1 + alpha) * mean(l): the two seeds' [b, 1] * [b] bug."""
    student, teacher = _student(), _teacher()
    plain, weighted, only = (
        _objective({"term": {"kind": kind, "confidence": how}})(student, teacher, Progress())
        for how in (False, "var_shifted", "var")
    )
    averaged = plain.loss * (1 + weighted.metrics["confidence"])
    assert not torch.isclose(weighted.loss, averaged, rtol=1e-3)
    torch.testing.assert_close(weighted.loss, plain.loss + only.loss)
    torch.testing.assert_close(weighted.gradients["image"], plain.gradients["image"] + only.gradients["image"])


def test_weights_move_with_progress():
    """A weight that rises from 0 to 2 in 10 steps is 1 after 5; the metric stays the term's own."""
    weight = {"kind": "linear", "start": 0.0, "end": 2.0, "steps": 10}
    objective, student = _objective({"clip": {"kind": "clip", "weight": weight}}), _student()
    for step, factor in ((0, 0.0), (5, 1.0), (10, 2.0), (20, 2.0)):
        outcome = objective(student, {}, Progress(step=step))
        torch.testing.assert_close(outcome.loss, factor * outcome.metrics["loss/clip"])


def test_each_call_starts_from_zero_gradients():
    """A step that the engine skipped leaves nothing behind for the next one."""
    objective, student, teacher = _objective(), _student(), _teacher()
    first = {name: value.clone() for name, value in _results(objective, student, teacher).items()}
    torch.testing.assert_close(_results(objective, student, teacher), first)


def _float(features: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: rows.float() for name, rows in features.items()}


def test_low_precision_features_are_computed_in_fp32():
    """bf16 features give what the same numbers in fp32 give, to the bit."""
    objective = _objective(dtype=torch.float32)
    low = _student(dtype=torch.bfloat16), _teacher(dtype=torch.bfloat16)
    full = _float(low[0]), {name: _float(features) for name, features in low[1].items()}
    actual, expected = _results(objective, *low), _results(objective, *full)
    assert {value.dtype for value in actual.values()} == {torch.float32}
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_autocast_is_off_inside():
    """The trainer's bf16 autocast does not reach similarities and softmax."""
    objective, student, teacher = (
        _objective(dtype=torch.float32),
        _student(dtype=torch.float32),
        _teacher(dtype=torch.float32),
    )
    expected = {name: value.clone() for name, value in _results(objective, student, teacher).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = _results(objective, student, teacher)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_none_stops_the_step(value):
    """NonFiniteLoss names the terms and the features that arrived broken; scales and bias stay as they were."""
    objective, student = _objective(), _student()
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    student["projected_text"][2, 1] = value
    with pytest.raises(
        NonFiniteLoss, match=r"loss/feature, .*loss/icl_own is not finite.*student projected_text on rank 0 \(rows 2\)$"
    ) as error:
        objective(student, _teacher(), Progress())
    assert "loss/clip" not in str(error.value)
    torch.testing.assert_close(objective.state_dict(), before, rtol=0, atol=0)


class _Saved:
    """Counts the bytes that autograd keeps for backward, now and at most."""

    def __init__(self):
        self.now = self.peak = 0

    def pack(self, tensor: Tensor) -> _Kept:
        return _Kept(self, tensor)


class _Kept:
    def __init__(self, counter: _Saved, tensor: Tensor):
        self.counter, self.tensor = counter, tensor
        counter.now += tensor.nbytes
        counter.peak = max(counter.peak, counter.now)

    def __del__(self):
        self.counter.now -= self.tensor.nbytes


def _peak(chunk_rows: int) -> int:
    saved = _Saved()
    student, teacher = _student(512, torch.float32), _teacher(512, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda kept: kept.tensor):
        _objective(dtype=torch.float32, chunk_rows=chunk_rows)(student, teacher, Progress())
    return saved.peak


def test_memory_follows_the_chunk():
    """Chunks of 64 of 512 rows keep an eighth of the similarities for backward; features may double that."""
    assert _peak(64) <= _peak(512) / 4
