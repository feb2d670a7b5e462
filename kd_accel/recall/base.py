"""What every term that remembers or learns something of its own does; letters: b, c, B rows as in chunks.py."""

from __future__ import annotations

from torch import Tensor, nn

from kd_accel.chunks import Step
from kd_accel.schedules import Progress

Rows = dict[str, Tensor]  # features of this rank by name: unit rows, and `raw.` ones


class Recall(nn.Module):
    """The methods that the objective calls, in their order; most terms need a few of them."""

    columns: tuple[str, ...] = ()  # derived leaves that are to be gathered

    def derive(self, student: Rows, teachers: dict[str, Rows], progress: Progress) -> Rows:
        return {}

    def prepare(self, step: Step, progress: Progress) -> None:
        pass

    def commit(self, ids: Tensor | None, noted: Rows) -> None:
        pass


def teacher_space(widths: dict[str, int], tower: str) -> int:
    """Width of the student's features that are compared with a teacher's: the projector's, where there is one."""
    return widths.get(f"projected_{tower}", widths[tower])
