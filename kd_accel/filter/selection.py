"""Which of scored images are kept, step by step, and their copy to tars of their own.

n images of all shards, in the order of the data.
"""

from __future__ import annotations

import json
import math
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kd_accel.data.index import build_index, expand_shards
from kd_accel.filter.scoring import TopK, best_first, distinct
from kd_accel.filter_config import FilterConfig
from kd_accel.whole_files import replacing


@dataclass(frozen=True, eq=False)
class Scored:
    """What was found in all shards."""

    files: list[str]  # where each shard lies
    parts: list[Path]
    key: np.ndarray  # [n] str
    shard: np.ndarray  # [n] int32
    row: np.ndarray  # [n] int64, in its shard
    best: np.ndarray  # [n] int32, the prompt it fits best; -1: unreadable
    score: np.ndarray  # [n] float32, its cosine; nan: unreadable
    top: np.ndarray | None  # [n] bool: among the top_k of some prompt; None: nobody asked
    bad: dict[int, str]  # image -> why it is unreadable

    @staticmethod
    def read(parts: list[Path], top_k: int | None) -> Scored:
        """What `parts` hold, one per shard."""
        found = [_columns_of(part) for part in parts]
        sizes = [len(part["best"]) for part in found]
        starts = np.cumsum([0, *sizes])
        reasons = [json.loads(str(part["bad"])) for part in found]
        return Scored(
            files=[str(part["shard"]) for part in found],
            parts=parts,
            key=np.concatenate([part["keys"] for part in found]),
            shard=np.repeat(np.arange(len(parts), dtype=np.int32), sizes),
            row=np.concatenate([np.arange(size) for size in sizes]),
            best=np.concatenate([part["best"] for part in found]),
            score=np.concatenate([part["score"] for part in found]),
            top=None if top_k is None else _top(found, starts, top_k),
            bad={int(starts[s]) + int(row): why for s, part in enumerate(reasons) for row, why in part.items()},
        )

    def features(self, images: np.ndarray) -> torch.Tensor:
        """[m, d] fp16 of some images, read from their parts."""
        found = None
        for shard in np.unique(self.shard[images]):
            mine = np.flatnonzero(self.shard[images] == shard)
            with np.load(self.parts[shard]) as part:
                rows = part["features"][self.row[images[mine]]]
            found = np.empty((len(images), rows.shape[1]), dtype=rows.dtype) if found is None else found
            found[mine] = rows
        return torch.from_numpy(found)


def select(scored: Scored, config: FilterConfig) -> tuple[np.ndarray, list[tuple[str, int]]]:
    """(images that are kept, in the order of the data; what each step left). Equal scores are ordered by key."""
    readable = np.flatnonzero(~np.isnan(scored.score))
    order = readable[best_first(_columns(scored, readable))]
    steps = []

    def keep(step: str, mask: np.ndarray) -> None:
        nonlocal order
        order = order[mask]
        steps.append((step, len(order)))

    if config.top_k is not None:
        keep(f"top_k={config.top_k}", scored.top[order])
    if config.min_score is not None:
        keep(f"min_score={config.min_score:g}", scored.score[order] >= config.min_score)
    if config.fraction is not None:
        keep(f"fraction={config.fraction:g}", np.arange(len(order)) < math.ceil(config.fraction * len(readable)))
    if config.max_per_prompt is not None:
        keep(f"max_per_prompt={config.max_per_prompt}", _place_in_group(scored.best[order]) < config.max_per_prompt)
    if config.dedup_threshold is not None and len(order):
        keep(f"dedup_threshold={config.dedup_threshold:g}", distinct(scored.features(order), config.dedup_threshold))
    return np.sort(order), steps


def write_tars(scored: Scored, kept: np.ndarray, shards: str | list[str], out: Path) -> None:
    """Copy the members of the `kept` images to tars of the same name in `out`, and index them.

    A shard of which nothing is kept gets no tar.
    """
    out.mkdir(exist_ok=True)
    written = []
    for number, path in enumerate(expand_shards(shards)):
        keys = set(scored.key[kept[scored.shard[kept] == number]].tolist())
        if keys:
            written.append(out / path.name)
            _copy(path, written[-1], keys)
    if written:
        build_index(written)


def _copy(path: Path, target: Path, keys: set[str]) -> None:
    with replacing(target) as temporary, tarfile.open(path, "r:") as tar, tarfile.open(temporary, "w") as copy:
        for member in filter(tarfile.TarInfo.isreg, tar):
            folder, slash, name = member.name.rpartition("/")
            if folder + slash + name.partition(".")[0] in keys:
                copy.addfile(member, tar.extractfile(member))


def _columns_of(part: Path) -> dict[str, np.ndarray]:
    """All but the features, which are read for those images alone that are compared with each other."""
    with np.load(part) as columns:
        return {name: columns[name] for name in columns.files if name != "features"}


def _top(found: list[dict[str, np.ndarray]], starts: np.ndarray, k: int) -> np.ndarray:  # [n] bool
    """Which images are among the `k` best of some prompt, over all shards."""
    candidates = [{name: part[f"top_{name}"] for name in TopK.COLUMNS} for part in found]
    top = TopK(1 + max((int(part["prompt"].max()) for part in candidates if len(part["prompt"])), default=0), k)
    for part in candidates:
        top.add(**part)
    mask = np.zeros(starts[-1], dtype=bool)
    mask[starts[top.shard] + top.row] = True
    return mask


def _columns(scored: Scored, images: np.ndarray) -> dict[str, np.ndarray]:
    """What best_first orders by, all prompts alike."""
    nothing = np.zeros(len(images), dtype=np.int32)
    return {"prompt": nothing, "score": scored.score[images], "key": scored.key[images]}


def _place_in_group(group: np.ndarray) -> np.ndarray:  # [m] -> [m] int64
    """How many equal numbers stand before each one."""
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    place = np.empty(len(group), dtype=np.int64)
    place[order] = np.arange(len(group)) - np.searchsorted(ordered, ordered)
    return place
