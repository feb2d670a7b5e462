"""How far a student says what its teacher says, of the same samples in the same order. n samples."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ROWS = 8192  # samples whose fp64 copies exist at a time

PREFIX = {"image": "teacher_", "text": "teacher_text_"}


def top1_match(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """teacher_top1_match: the share of samples that both give the same class, right or wrong.

    Predictions [n, k] int64 each, best first.
    """
    return {"teacher_top1_match": (student[:, 0] == teacher[:, 0]).double().mean().item()}


def feature_agreement(
    student: Tensor, teacher: Tensor, *, of: Literal["image", "text"] = "image"
) -> dict[str, float | None]:
    """teacher_feature_cosine and teacher_cka of student [n, d] and teacher [n, e]; teacher_text_... of texts.

    The cosine is the mean over the samples, None where d is not e: then the two spaces are not one. CKA is `linear_cka`
    of the unit rows, which is what a CLIP compares; it asks for neither the width nor the axes.
    """
    student, teacher = F.normalize(student.float(), dim=1), F.normalize(teacher.float(), dim=1)
    alike = student.shape[1] == teacher.shape[1]
    cosine = (student * teacher).sum(dim=1).double().mean().item() if alike else None
    return {f"{PREFIX[of]}feature_cosine": cosine, f"{PREFIX[of]}cka": linear_cka(student, teacher)}


def linear_cka(x: Tensor, y: Tensor) -> float | None:
    """|X'Y|^2 / (|X'X| |Y'Y|) of the centred rows, x [n, d] and y [n, e]: 0..1, and 1 up to rotation, shift and scale.

    The plain estimate of arXiv:1905.00414, section 3, in d x e space: for independent x and y it is above 0, the more
    so the closer n is to d. None where all rows of one side are alike, as far as fp32 can tell.
    """
    x_mean, y_mean = (rows.mean(dim=0, dtype=torch.float64) for rows in (x, y))
    chunks = zip(x.split(CHUNK_ROWS), y.split(CHUNK_ROWS), strict=True)
    xy, xx, yy = 0, 0, 0
    for x_rows, y_rows in ((x_rows.double() - x_mean, y_rows.double() - y_mean) for x_rows, y_rows in chunks):
        xy, xx, yy = xy + x_rows.T @ y_rows, xx + x_rows.T @ x_rows, yy + y_rows.T @ y_rows
    if _is_rounding(xx, x_mean, len(x)) or _is_rounding(yy, y_mean, len(y)):
        return None
    return (xy.square().sum() / (xx.norm() * yy.norm())).item()


def _is_rounding(scatter: Tensor, mean: Tensor, n: int) -> bool:
    """Whether n rows with this X'X [d, d] differ from their mean [d] by no more than fp32 rounds."""
    return scatter.trace().item() <= n * mean.square().sum().item() * torch.finfo(torch.float32).eps ** 2
