"""What every term that remembers or learns something of its own does; letters: b, c, B rows as in chunks.py."""

from __future__ import annotations

from torch import Tensor, nn

from kd_accel.chunks import Chunk, Step
from kd_accel.schedules import Progress

Rows = dict[str, Tensor]  # features of this rank by name: unit rows, and `raw.` ones


class Recall(nn.Module):
    """The methods that the objective calls, in their order; most terms need a few of them."""

    columns: tuple[str, ...] = ()  # derived leaves that are to be gathered

    def derive(self, student: Rows, teachers: dict[str, Rows], progress: Progress) -> Rows:
        """Leaves made from this rank's features, [b] or [b, d] by a name with a dot in it, with their graph."""
        return {}

    def prepare(self, step: Step, progress: Progress) -> None:
        """Look up what this step needs, before its first chunk."""

    def rows(self, chunk: Chunk, scale: Tensor) -> Tensor:
        """One number per row, [c]; notes what is to be remembered."""
        raise NotImplementedError

    def commit(self, ids: Tensor | None, noted: Rows) -> None:
        """Remember what all ranks noted, [B] or [B, k] by name, of samples `ids` [B]; only of a step that was taken."""
