"""Where a number that is not finite came from: whose rows, on which rank, of which samples."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_accel import distributed

MOST = 8  # sample ids that are named


def non_finite_rows(named: dict[str, Tensor], ids: Tensor | None) -> list[str]:
    """One line for each of this process's [b, ...] tensors with an inf or a nan, on any rank; collective.

    "student image on rank 1 (sample ids 3, 9)", or its rows where there are no ids.
    """
    found = {name: ~torch.isfinite(rows.reshape(len(rows), -1)).all(dim=1) for name, rows in named.items()}
    mine = {name: _listed(broken, ids) for name, broken in found.items() if broken.any()}
    ranks = enumerate(distributed.gather_objects(mine))
    return [f"{name} on rank {rank} ({which})" for rank, broken in ranks for name, which in broken.items()]


def _listed(broken: Tensor, ids: Tensor | None) -> str:
    numbers = (broken.nonzero()[:, 0] if ids is None else ids[broken]).tolist()
    more = ", ..." if len(numbers) > MOST else ""
    return f"{'rows' if ids is None else 'sample ids'} {', '.join(map(str, numbers[:MOST]))}{more}"
