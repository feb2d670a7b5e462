"""Where a number that is not finite came from: rows or sample ids, by feature, of tensors of every shape."""

from __future__ import annotations

import math

import every_term
import pytest
import torch

from kd_accel.blame import non_finite_rows
from kd_accel.objective import NonFiniteLoss
from kd_accel.schedules import Progress


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 2)], ids=str)
def test_rows_of_any_shape(shape):
    """One broken number marks its row, by its place or by its sample id."""
    rows = torch.zeros(shape)
    rows.view(4, -1)[2, -1] = math.inf
    given = {"it": rows, "fine": torch.zeros(shape)}
    assert non_finite_rows(given, None) == ["it on rank 0 (rows 2)"]
    assert non_finite_rows(given, torch.tensor([7, 5, 31, 4])) == ["it on rank 0 (sample ids 31)"]


def assert_blames(term: str, feature: str) -> None:
    """Row 1 of a student's feature is nan: it is named, by its sample id, and nothing else is."""
    objective, given = every_term.objective([term]), every_term.features()
    given["student"][feature][1, 0] = math.nan
    with pytest.raises(NonFiniteLoss) as error:
        every_term.call(objective, given, Progress())
    expected = f"not finite on arrival: student {feature} on rank 0 (sample ids {given['ids'][1]})"
    assert str(error.value).partition("; ")[2] == expected


@pytest.mark.parametrize("term", ["gcl_tempnet", "gcl_disttempnet", "augmented"])
def test_what_a_term_derives_is_not_blamed(term):
    """Temperatures [b] and fused rows follow from the feature that is named."""
    assert_blames(term, "projected_text" if term == "augmented" else "text")


def test_class_logits_are_blamed():
    """They have no unit rows beside them."""
    assert_blames("label_head", "class_logits")
