"""The files of a store: ranks share those that are missing, and each is complete or absent.

n samples of a shard, V views, m texts, d width.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from kd_accel import distributed
from kd_accel.data.embeddings import EmbeddingStore
from kd_accel.data.store_files import INFO, StoreInfo, keys_sha256, map_shard, save_shard, shard_names, shard_starts
from kd_accel.embed.job import Job
from kd_accel.schema import ConfigError, LocalError, flat
from kd_accel.text_files import replace_text

BAD = "bad_samples.jsonl"


@dataclass(frozen=True)
class ShardRows:
    """Features of the samples of one shard; a bad one has nan in `image` and no texts."""

    features: dict[str, Tensor]  # image [n, V, d], text [m, d], fp32 on the CPU
    num_texts: list[int] | None  # [n]; None without texts
    bad: dict[int, str]  # row -> reason


Make = Callable[[list[int]], Iterator[ShardRows]]  # numbers of shards -> their features, in that order


def write_store(job: Job, make: Make) -> None:
    """Write the files that are missing; collective. Raises ConfigError where `out` holds another store."""
    began = time.perf_counter()
    with distributed.failing_together():
        missing = _prepare(job) if distributed.is_main() else []
    missing = distributed.from_main(missing)
    mine = missing[distributed.rank() :: distributed.world_size()]
    with distributed.failing_together():
        _write(job, mine, make)
    with distributed.failing_together():
        if distributed.is_main():
            _summarise(job, missing, time.perf_counter() - began)


def _prepare(job: Job) -> list[int]:
    """Make store.json, or compare it; the shards that have no usable file yet."""
    try:
        job.out.mkdir(parents=True, exist_ok=True)
        if (job.out / INFO).is_file():
            _compare(StoreInfo.read(job.out, "out"), job)
        job.info.write(job.out)
    except OSError as error:
        raise ConfigError(f"out={job.out}: cannot be written to ({error})") from None
    names, starts = shard_names(job.source), shard_starts(job.source)
    return [shard for shard, name in enumerate(names) if not _is_done(job, name, range(*starts[shard : shard + 2]))]


def _compare(found: StoreInfo, job: Job) -> None:
    theirs, ours = (flat(json.loads(json.dumps(asdict(info)))) for info in (found, job.info))
    differing = [key for key in theirs | ours if theirs.get(key) != ours.get(key)]
    if differing:
        said = "; ".join(f"{key}: there {theirs.get(key)}, here {ours.get(key)}" for key in differing)
        raise ConfigError(f"out={job.out}: another store is there, take another out or delete it ({said})")


def _is_done(job: Job, name: str, ids: range) -> bool:
    path = job.out / name
    if not path.is_file():
        return False
    try:
        metadata = map_shard(path, "out").metadata
    except LocalError:
        return False
    made_of = _metadata(job, ids)
    return all(metadata.get(key) == value for key, value in made_of.items())


def _metadata(job: Job, ids: range) -> dict:
    return {"store_sha256": job.info.sha256(), "keys_sha256": keys_sha256(job.source, ids), "first_id": ids[0]}


def _write(job: Job, shards: list[int], make: Make) -> None:
    names, starts = shard_names(job.source), shard_starts(job.source)
    samples = int(sum(starts[shard + 1] - starts[shard] for shard in shards))
    bar = tqdm(total=samples, unit="samples", desc="embed", disable=None if distributed.is_main() else True)
    with bar:
        for shard, rows in zip(shards, make(shards), strict=True):
            ids = range(*starts[shard : shard + 2])
            first = None if rows.num_texts is None else torch.tensor([0, *rows.num_texts]).cumsum(0)
            made_of = _metadata(job, ids)
            path = job.out / names[shard]
            save_shard(path, rows.features, dtype=job.config.dtype, starts=first, bad=rows.bad, **made_of)
            bar.update(len(ids))


def _summarise(job: Job, written: list[int], seconds: float) -> None:
    """bad_samples.jsonl of the whole store, and a sentence."""
    store = EmbeddingStore(job.out, key="out")
    store.attach(job.source, job.config.data)
    bad = list(store.bad_samples())
    replace_text(job.out / BAD, "".join(f"{json.dumps(record)}\n" for record in bad))
    names, sizes = shard_names(job.source), job.source.shard_sizes
    samples, total = int(sum(sizes[shard] for shard in written)), job.source.num_samples
    size = sum((job.out / name).stat().st_size for name in names)
    speed = f" at {samples / seconds:,.0f} samples/s" if samples else ""
    print(
        f"{samples:,} of {total:,} samples embedded now, in {len(written)} of {len(names)} shards{speed};"
        f" {job.out}: {size / 2**20:,.1f} MiB of {' and '.join(job.towers)}"
        + (f"; {len(bad):,} unreadable samples, see {BAD}" if bad else "")
    )
