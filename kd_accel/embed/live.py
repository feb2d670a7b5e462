"""The features of shards, from a teacher that runs: workers decode, the device encodes.

b samples of a block, n of a shard, V views, m texts, T tokens, d width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kd_accel.data.captions import all_texts
from kd_accel.data.source import BadSample, Sample
from kd_accel.data.store_files import shard_starts
from kd_accel.data.workers import items_of
from kd_accel.embed.job import Job
from kd_accel.embed.writer import ShardRows
from kd_accel.models.teacher import Teacher
from kd_accel.trim import trimmed


@dataclass(frozen=True)
class Block:
    """What the teacher is to see of some neighbouring samples; bad ones have neither views nor texts."""

    num_samples: int  # b
    views: Tensor | None  # [(b - bad) * V, 3, H, W] uint8
    tokens: Tensor | None  # [m, T]
    num_texts: list[int]  # [b]
    bad: dict[int, str]  # row in the block -> reason


def embed_shards(job: Job, shards: list[int]) -> Iterator[ShardRows]:
    """Of each shard in turn; one set of workers serves all of them."""
    starts = shard_starts(job.source)
    step = max(1, job.config.embed_batch_size // job.config.views)
    blocks = {shard: _cut(int(starts[shard]), int(starts[shard + 1]), step) for shard in shards}
    in_turn = _in_turn(job, blocks)
    with closing(items_of(_Blocks(job), num_workers=job.config.data.num_workers, sampler=in_turn)) as items:
        for shard in shards:
            yield _joined(job, [(block, _encode(job, block)) for block in islice(items, len(blocks[shard]))])


def encode_rows(teacher: Teacher, tower: str, rows: Tensor, *, at_a_time: int) -> Tensor:
    """uint8 views `[r,3,H,W]`, or tokens `[r,T]` -> fp32 features `[r,d]` of a tower, on the CPU."""
    teacher.read = {tower}
    device = next(teacher.parameters()).device
    said = []
    for part in rows.split(at_a_time):
        given = {"image": None, "text": None} | {tower: part.to(device)}
        said.append(teacher(**given)[tower].float().cpu())
    return torch.cat(said) if said else torch.empty(0, teacher.embed_dim)


class _Blocks(Dataset):
    """ids of neighbouring samples -> Block, in the workers."""

    def __init__(self, job: Job):
        self._source, self._views, self._count = job.source, job.views, job.config.views
        self._templates = job.config.data.templates if "text" in job.towers else None
        self._text = job.teacher.contract.text

    def __getitem__(self, ids: range) -> Block:
        views, texts, counts, bad = [], [], [], {}
        for row, sample_id in enumerate(ids):
            try:
                mine, said = self._look(self._source.read(sample_id))
            except BadSample as error:
                mine, said, bad[row] = [], [], error.reason
            views += mine
            texts += said
            counts.append(len(said))
        return Block(
            len(ids),
            torch.stack(views) if views else None,
            trimmed(self._text.tokenize(texts), self._text.pad) if texts else None,
            counts,
            bad,
        )

    def _look(self, sample: Sample) -> tuple[list[Tensor], list[str]]:
        views = [] if self._views is None else [self._views.make(sample, view) for view in range(self._count)]
        return views, [] if self._templates is None else all_texts(sample, self._templates)


def _encode(job: Job, block: Block) -> dict[str, Tensor]:
    """image [b, V, d], text [m, d] of a block; samples whose features are not finite become bad ones."""
    rows, said = {"image": block.views, "text": block.tokens}, {}
    for tower in job.towers:
        given = torch.empty(0) if rows[tower] is None else rows[tower]
        said[tower] = encode_rows(job.teacher, tower, given, at_a_time=job.config.embed_batch_size)
    if "image" in said:
        good = [row for row in range(block.num_samples) if row not in block.bad]
        whole = torch.full((block.num_samples, job.config.views, said["image"].shape[1]), torch.nan)
        whole[good] = said["image"].unflatten(0, (len(good), job.config.views))
        said["image"] = whole
    _refuse_non_finite(block, said)
    return said


def _refuse_non_finite(block: Block, said: dict[str, Tensor]) -> None:
    owners = torch.arange(block.num_samples).repeat_interleave(torch.tensor(block.num_texts))
    for tower, rows in said.items():
        odd = (~rows.isfinite()).flatten(1).any(dim=1).nonzero()[:, 0]
        for row in (odd if tower == "image" else owners[odd]).tolist():
            block.bad.setdefault(row, f"the teacher's {tower} features are not finite")


def _joined(job: Job, blocks: list[tuple[Block, dict[str, Tensor]]]) -> ShardRows:
    features = {tower: torch.cat([said[tower] for _, said in blocks]) for tower in job.towers}
    counts = [count for block, _ in blocks for count in block.num_texts] if "text" in job.towers else None
    bad, start = {}, 0
    for block, _ in blocks:
        bad |= {start + row: reason for row, reason in block.bad.items()}
        start += block.num_samples
    return ShardRows(features, counts, bad)


def _in_turn(job: Job, blocks: dict[int, list[range]]) -> Iterator[range]:
    """The blocks of all shards; remote shards are fetched ahead."""
    shards = list(blocks)
    for number, shard in enumerate(shards):
        job.source.prefetch(shards[number:])
        yield from blocks[shard]


def _cut(start: int, end: int, step: int) -> list[range]:
    return [range(first, min(first + step, end)) for first in range(start, end, step)]
