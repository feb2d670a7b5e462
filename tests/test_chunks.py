"""How hard a sample is for its teacher: of teachers that are much too good or too bad for the exponentials of fp32.

B rows, d width.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kd_accel.chunks import Step
from kd_accel.types import TeacherSpec

B, D, SCALE = 9, 64, 100.0


def hardness(image: Tensor, text: Tensor) -> Tensor:
    """Of every sample in a batch of fp32 features, [B], four rows at a time."""
    teachers = {"teacher": {"image": F.normalize(image, dim=1).float(), "text": F.normalize(text, dim=1).float()}}
    step = Step(
        {"image": image.float(), "text": text.float()},
        teachers,
        specs={"teacher": TeacherSpec(D, SCALE)},
        columns=[],
        teacher_columns=[("teacher", "image"), ("teacher", "text")],
    )
    step.measure_hardness("teacher", chunk_rows=4)
    return step.hardness["teacher"]


def as_written(image: Tensor, text: Tensor) -> Tensor:
    """(h_i - mean h) / std h with h_i the mean of exp(z_ij - z_ii), in float64, whose exponents reach further."""
    z = SCALE * F.normalize(image.double(), dim=1) @ F.normalize(text.double(), dim=1).T
    others = ~torch.eye(B, dtype=torch.bool)
    h = sum(((way - way.diagonal()[:, None]).exp() * others).sum(dim=1) for way in (z, z.T)) / (2 * (B - 1))
    return (h - h.mean()) / h.std()


def _alike() -> Tensor:
    return F.normalize(torch.randn(B, D), dim=1)


def _apart() -> Tensor:
    return torch.eye(B, D) + 0.01 * torch.randn(B, D)


@pytest.mark.parametrize(
    ("images", "sign", "noise"),
    [(_apart, 1, 0.01), (_alike, 1, 0.5), (_alike, -1, 0.01)],
    ids=["too good", "plausible", "too bad"],
)
def test_hardness_is_that_of_float64(images, sign, noise):
    """Also where every exponential is 0 or infinite in fp32; 2e-3, for the teacher's logits are good to 1e-5 of 100."""
    image = images()
    text = sign * image + noise * torch.randn(B, D)
    actual = hardness(image, text).double()
    torch.testing.assert_close(actual, as_written(image, text), rtol=2e-3, atol=2e-3)


def test_samples_that_are_equally_hard():
    """None stands out: 0, not 0 / 0."""
    rows = torch.eye(B, D)
    assert torch.equal(hardness(rows, rows), torch.zeros(B))
