"""The features of the images of shards: of a store, or of a teacher that looks at them now.

b rows of a batch, n images of a shard, d embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kd_accel.data.embeddings import EmbeddingStore
from kd_accel.data.source import BadSample, Source
from kd_accel.data.transforms import decode, eval_view
from kd_accel.data.workers import items_of
from kd_accel.filter_config import FilterConfig
from kd_accel.models.image import encode_image
from kd_accel.models.teacher import Teacher
from kd_accel.schema import ConfigError
from kd_accel.types import ImageInput

ShardFeatures = tuple[Tensor, dict[int, str]]  # [n, d], and for each row without a usable image the reason


def stored_features(store: EmbeddingStore, ids: list[range], pending: list[int]) -> Iterator[ShardFeatures]:
    """Those of the first view, of each of the shards `pending`; `ids` are the sample ids of every shard."""
    for shard in pending:
        rows, bad = np.arange(ids[shard].start, ids[shard].stop), {}
        features = store.read(rows, view=0, texts=np.zeros_like(rows))["image"]
        for row in (~features.isfinite().all(1)).nonzero()[:, 0].tolist():
            try:
                store.check(ids[shard][row])
            except BadSample as error:
                bad[row] = error.reason
        yield features, bad


def live_features(
    source: Source, ids: list[range], pending: list[int], teacher: Teacher, config: FilterConfig
) -> Iterator[ShardFeatures]:
    """Those of the evaluation view, of each of the shards `pending`; `ids` are the sample ids of every shard.

    Raises ConfigError for a teacher without an image tower.
    """
    if teacher.contract.image is None:
        raise ConfigError("teacher: has no image tower")
    step, wanted, device = config.batch_size, teacher.contract.image, next(teacher.parameters()).device
    batches = [[ids[shard][start : start + step] for start in range(0, len(ids[shard]), step)] for shard in pending]
    images = _Images(source, [batch for shard in batches for batch in shard], wanted)
    with closing(items_of(images, num_workers=config.num_workers)) as items:
        for shard in batches:
            features, bad = [], {}
            for number, (views, reasons) in enumerate(islice(items, len(shard))):
                with torch.no_grad():
                    features.append(encode_image(teacher.clip, views.to(device), wanted).float().cpu())
                features[-1][list(reasons)] = torch.nan
                bad |= {number * step + row: reason for row, reason in reasons.items()}
            yield torch.cat(features), bad


@dataclass(frozen=True)
class _Images(Dataset):
    """Batches of decoded images: (views [b, 3, H, W] uint8, {row of the batch: why it could not be read})."""

    source: Source
    batches: list[range]  # ids
    wanted: ImageInput

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[Tensor, dict[int, str]]:
        bad: dict[int, str] = {}
        views = torch.zeros(len(self.batches[number]), 3, *self.wanted.size, dtype=torch.uint8)
        for row, sample_id in enumerate(self.batches[number]):
            try:
                views[row] = eval_view(decode(self.source.read(sample_id).image), self.wanted)
            except BadSample as error:
                bad[row] = error.reason
        return views, bad
