"""A share of a store against the teacher that it stands for, shown as training shows it.

b samples, d width.
"""

from __future__ import annotations

import math

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from kd_accel import distributed
from kd_accel.data.captions import draw_text
from kd_accel.data.embeddings import EmbeddingStore
from kd_accel.data.source import BadSample
from kd_accel.data.views import Views
from kd_accel.embed.job import Job
from kd_accel.embed.live import encode_rows
from kd_accel.schema import ConfigError

COSINE = 0.999  # mirrored views of one picture are around 0.87 to each other, other crops around 0.9


def check_share(job: Job) -> None:
    """Look at `verify` of the samples again, at least one, each in some epoch; collective.

    Raises ConfigError, naming the worst sample, where a cosine is under 0.999.
    """
    store = EmbeddingStore(job.out, key="out")
    store.attach(job.source, job.config.data)
    _same_teacher(store, job)
    rng = np.random.default_rng(job.config.seed)
    number = max(1, math.ceil((job.config.verify or 0.001) * job.source.num_samples))
    ids = np.sort(rng.choice(job.source.num_samples, number, replace=False))
    found = [
        row
        for i in ids[distributed.rank() :: distributed.world_size()].tolist()
        for row in _cosines(job, store, i, epoch=i % job.config.views)
    ]
    everyone = [row for ranks in distributed.gather_objects(found) for row in ranks]
    if not everyone:
        raise ConfigError(f"verify={job.config.verify}: none of the {number} samples can be read: raise it")
    cosine, tower, worst = min(everyone)
    if not cosine >= COSINE:
        raise ConfigError(
            f"out={job.out}: the {tower} features stored of sample {job.source.key(worst)} in"
            f" {job.source.shard(worst)} have a cosine of {cosine:.4f} to the teacher's, {COSINE} is needed: the store"
            " is not of this data and config, or damaged; delete it and embed again"
        )
    if distributed.is_main():
        print(f"{number} samples looked at again: cosines of {cosine:.6f} and more to what is stored")


def _same_teacher(store: EmbeddingStore, job: Job) -> None:
    if (store.info.weights_sha256, store.info.towers) != (job.info.weights_sha256, job.info.towers):
        raise ConfigError(f"out={job.out}: the store there is of other weights, or of other towers")


def _cosines(job: Job, store: EmbeddingStore, sample_id: int, *, epoch: int) -> list[tuple[float, str, int]]:
    """(cosine, tower, id) of each tower; none for a bad sample."""
    try:
        store.check(sample_id)
        sample = job.source.read(sample_id)
    except BadSample:
        return []
    config, number, rows = job.config, 0, {}
    if "text" in job.towers:
        text, number = draw_text(sample, config.data, seed=config.seed, epoch=epoch)
        rows["text"] = job.teacher.contract.text.tokenize([text])
    if "image" in job.towers:
        rows["image"] = Views(job.views.size, config.data.augment, config.seed).make(sample, epoch)[None]
    stored = store.read(np.array([sample_id]), view=epoch, texts=np.array([number]))
    live = {tower: encode_rows(job.teacher, tower, given, at_a_time=1) for tower, given in rows.items()}
    return [(_cosine(live[tower], stored[tower]), tower, sample_id) for tower in rows]


def _cosine(a: Tensor, b: Tensor) -> float:
    cosine = F.cosine_similarity(a.float(), b.float()).item()
    return cosine if math.isfinite(cosine) else -1.0
