"""Agreement with the teacher, by formulas of other shapes."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import accuracy_score
from sklearn.metrics.pairwise import paired_cosine_distances

from kd_accel.evals import agreement
from kd_accel.evals.agreement import feature_agreement, linear_cka, top1_match


def test_top1_match_is_the_accuracy_with_the_teacher_as_truth():
    """The first of five counts alone."""
    student, teacher = torch.randint(0, 3, (100, 5)), torch.randint(0, 3, (100, 5))
    expected = accuracy_score(teacher[:, 0], student[:, 0])
    assert top1_match(student, teacher) == {"teacher_top1_match": pytest.approx(expected)}


def gram_cka(x, y):
    """HSIC of the n x n Gram matrices (arXiv:1905.00414, equation 3): the definition, which linear_cka never forms."""
    n = len(x)
    center = torch.eye(n, dtype=x.dtype) - 1 / n
    k, l = (center @ (rows @ rows.T) @ center for rows in (x, y))  # noqa: E741
    return ((k * l).sum() / (k.norm() * l.norm())).item()


@pytest.mark.parametrize("chunk_rows", [8192, 7])
@pytest.mark.parametrize("width", [6, 11])
def test_cka_is_that_of_the_gram_matrices(monkeypatch, chunk_rows, width):
    """Widths alike and not, rows off the origin."""
    monkeypatch.setattr(agreement, "CHUNK_ROWS", chunk_rows)
    x = torch.randn(50, 6).double() + 2
    y = torch.cat([x, torch.randn(50, 5).double()], dim=1)[:, -width:]
    assert linear_cka(x, y) == pytest.approx(gram_cka(x, y))


def test_cka_is_one_up_to_rotation_shift_and_scale():
    x = torch.randn(100, 5).double()
    rotation, _ = torch.linalg.qr(torch.randn(5, 5).double())
    assert linear_cka(x, 3 * x @ rotation + 7) == pytest.approx(1)
    assert linear_cka(x, torch.randn(100, 5)) < 0.5


@pytest.mark.parametrize("value", [0, 1, 0.1])
def test_cka_of_rows_that_are_all_alike_is_none(value):
    """Also where their mean rounds, and then on either side."""
    rows = torch.randn(10, 3)
    assert linear_cka(rows, torch.full((10, 4), float(value))) is None
    assert linear_cka(torch.full((10, 4), float(value)), rows) is None


def test_features_agree_as_unit_rows():
    """Lengths do not count for either number; the names say which tower."""
    student = torch.randn(30, 4)
    teacher = student + 0.5 * torch.randn(30, 4)
    unit = [torch.nn.functional.normalize(rows, dim=1).double() for rows in (student, teacher)]
    expected = (1 - paired_cosine_distances(student, teacher)).mean(), linear_cka(*unit)
    found = feature_agreement(student * torch.logspace(-2, 2, 30)[:, None], teacher, of="text")
    assert found == {
        "teacher_text_feature_cosine": pytest.approx(expected[0]),
        "teacher_text_cka": pytest.approx(expected[1], rel=1e-5),
    }


def test_other_widths_have_no_cosine():
    found = feature_agreement(torch.randn(30, 4), torch.randn(30, 9))
    assert found["teacher_feature_cosine"] is None
    assert 0 < found["teacher_cka"] < 1
