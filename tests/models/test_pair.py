"""Student and teacher as one module, and that module under ZeRO-3."""

from __future__ import annotations

import pytest
import torch

from kd_accel.models.pair import Pair
from kd_accel.models.teacher import Teacher
from kd_accel.sections import TeacherConfig


@pytest.fixture
def teacher(release):
    return Teacher(TeacherConfig(path=str(release("timm"))))


def test_forward_is_that_of_its_parts(student, teacher, view, captions):
    """Each model gets its own tokens, and answers under its name."""
    model = student().eval()
    own, other = model.contract.text.tokenize(captions), teacher.contract.text.tokenize(captions[::-1])
    out = Pair(model, {"large": teacher, "base": teacher})(view, {"student": own, "large": other, "base": own})
    expected = {"student": model(view, own), "large": teacher(view, other), "base": teacher(view, own)}
    torch.testing.assert_close(out, expected)


def test_without_a_teacher_there_is_the_student(student, view, captions):
    model = student().eval()
    out = Pair(model, {})(view, {"student": model.contract.text.tokenize(captions)})
    assert out.keys() == {"student"}


def test_train_reaches_the_student_alone(student, teacher):
    pair = Pair(student(), {"teacher": teacher})
    pair.train()
    assert pair.student.clip.training
    assert not [module for module in pair.teachers["teacher"].modules() if module.training]
    pair.eval()
    assert not pair.student.clip.training


@pytest.mark.distributed
def test_under_zero3_features_and_gradients_are_the_same(run_ranks, release):
    """ZeRO-3 keeps no parameter whole outside forward; two ranks give the features and steps of the plain module."""
    run_ranks(["tests/models/zero3_worker.py", str(release("timm"))])
