"""Files of what is remembered by sample id, apart from the rest of a checkpoint because it grows with the data.

    state/memory_00000_of_00004.safetensors     columns by name, and `ids`: [3] int64, first, end, number of samples

Sharded, every rank writes the ids it holds; replicated, rank 0 writes one file of all. Loading asks for neither the
same mode nor the same number of ranks: each rank reads the rows of its own ids, out of whichever files hold them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from kd_accel import distributed
from kd_accel.memory import own_ids
from kd_accel.objective import Objective
from kd_accel.schema import ConfigError

IDS = "ids"
NAME = "memory_{:05d}_of_{:05d}.safetensors"


def memory_snapshot(objective: Objective) -> dict[str, dict[str, Tensor]]:
    """The file that this rank is to write, name -> tensors, copied to the CPU; {} when it has none."""
    columns = objective.by_id()
    if not columns or not (objective.sharded or distributed.is_main()):
        return {}
    own = own_ids(objective.num_ids, sharded=objective.sharded)
    part, parts = (distributed.rank(), distributed.world_size()) if objective.sharded else (0, 1)
    copies = {name: column.to("cpu", copy=True) for name, column in columns.items()}
    return {NAME.format(part, parts): {**copies, IDS: torch.tensor([own.start, own.stop, objective.num_ids])}}


def memory_files(folder: Path) -> list[Path]:
    """In the order of their ids; [] when nothing is remembered. Raises FileNotFoundError when some are missing."""
    found = sorted(folder.glob("memory_*_of_*.safetensors"))
    if not found:
        return []
    parts = int(found[0].stem.rpartition("_")[2])
    if missing := {NAME.format(part, parts) for part in range(parts)} - {path.name for path in found}:
        raise FileNotFoundError(f"{folder / min(missing)} is missing")
    return found


@torch.no_grad()
def load_memory(folder: Path, objective: Objective) -> None:
    """Read the rows of this rank's ids, whoever wrote them.

    Raises FileNotFoundError or KeyError when files or columns are missing, ConfigError when they are of other data.
    """
    columns = objective.by_id()
    if not columns:
        return
    own = own_ids(objective.num_ids, sharded=objective.sharded)
    if not (paths := memory_files(folder)):
        raise FileNotFoundError(f"{folder / NAME.format(0, 1)} is missing")
    for path in paths:
        with safe_open(path, framework="pt") as file:
            start, end, num_ids = file.get_tensor(IDS).tolist()
            if num_ids != objective.num_ids:
                raise ConfigError(
                    f"{path}: remembers {num_ids} samples, data.shards has {objective.num_ids}: give back the shards it"
                    " was trained on, or start a new run (name=OTHER)"
                )
            if differing := columns.keys() ^ (set(file.keys()) - {IDS}):
                raise KeyError(f"{path.name}: {min(differing)}")
            first, last = max(start, own.start), min(end, own.stop)
            if first >= last:
                continue
            for name, column in columns.items():
                rows = file.get_slice(name)[first - start : last - start]
                column[first - own.start : last - own.start] = rows.to(column)
