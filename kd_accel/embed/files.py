"""Features in numpy's files, as other programs keep them: one KEY.npy per sample, or one array of all, [N, d].

A sample's file is named by its key without folder and extension.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from tqdm import tqdm

from kd_accel import distributed
from kd_accel.data.embeddings import EmbeddingStore
from kd_accel.data.open import open_source
from kd_accel.data.source import BadSample, Source
from kd_accel.data.store_files import shard_starts
from kd_accel.embed.job import Job
from kd_accel.embed.writer import ShardRows
from kd_accel.embed_config import EmbedConfig
from kd_accel.schema import ConfigError
from kd_accel.whole_files import replacing


def width(path: str) -> int:
    """d of the features in a folder of .npy files, or in one. Raises ConfigError where there are none."""
    file = Path(path)
    if file.is_dir():
        first = next(file.rglob("*.npy"), None)
        if first is None:
            raise ConfigError(f"from_npy={path}: no .npy in this folder")
        return len(_row(first))
    return _table(file).shape[1]


def read_npy(job: Job, shards: list[int]) -> Iterator[ShardRows]:
    """Features [n, 1, d], or [n, d] of texts, of each shard in turn; a sample without a file is a bad one."""
    place, starts = Path(job.config.from_npy), shard_starts(job.source)
    if place.is_dir():
        files = {path.stem: path for path in sorted(place.rglob("*.npy"))}
        row_of = partial(_row_of_file, files, _stems(job.source))
    else:
        table = _table(place)
        if len(table) != job.source.num_samples:
            raise ConfigError(f"from_npy={place}: {len(table)} rows, but the data has {job.source.num_samples} samples")
        row_of = partial(_row_of_table, table)
    for shard in shards:
        yield _shard_rows(job, range(*starts[shard : shard + 2]), row_of)


def write_npy(config: EmbedConfig) -> None:
    """What the store holds of one tower, fp32: the first view, or the first text; bad samples get no file, or nan."""
    tower = (config.towers or ["image"])[0]
    store = EmbeddingStore(config.out, key="out", towers={tower})
    if tower not in store.towers:
        raise ConfigError(
            f"out={config.out}: the store has no {tower} features, only {' and '.join(store.info.towers)}"
        )
    source, _ = open_source(config.data, images=tower == "image", captions=tower == "text")
    store.attach(source, config.data)
    if not distributed.is_main():
        return
    place = Path(config.to_npy)
    rows = _stored_rows(store, source, tower)
    if place.suffix == ".npy":
        nothing = np.full(store.info.embed_dim, np.nan, dtype=np.float32)
        place.parent.mkdir(parents=True, exist_ok=True)
        _save(place, np.stack([nothing if row is None else row for row in rows]))
    else:
        place.mkdir(parents=True, exist_ok=True)
        for stem, row in zip(_stems(source), rows, strict=True):
            if row is not None:
                _save(place / f"{stem}.npy", row)
    print(f"{source.num_samples - sum(1 for _ in store.bad_samples())} of {source.num_samples} samples in {place}")


def _stored_rows(store: EmbeddingStore, source: Source, tower: str) -> Iterator[np.ndarray | None]:
    """fp32 [d] of every sample; None for a bad one."""
    for i in tqdm(range(source.num_samples), unit="samples", disable=None):
        try:
            store.check(i)
        except BadSample:
            yield None
            continue
        yield store.read(np.array([i]), view=0, texts=np.zeros(1, dtype=int))[tower][0].float().numpy()


def _shard_rows(job: Job, ids: range, row_of) -> ShardRows:
    rows, bad = np.full((len(ids), job.info.embed_dim), np.nan, dtype=np.float32), {}
    for number, i in enumerate(ids):
        try:
            rows[number] = row_of(int(i), job.info.embed_dim)
        except BadSample as error:
            bad[number] = error.reason
    if job.towers == ["image"]:
        return ShardRows({"image": torch.from_numpy(rows)[:, None]}, None, bad)
    good = [number not in bad for number in range(len(ids))]
    return ShardRows({"text": torch.from_numpy(rows[good])}, [int(g) for g in good], bad)


def _row_of_file(files: dict[str, Path], stems: list[str], i: int, width: int) -> np.ndarray:
    if stems[i] not in files:
        raise BadSample(f"there is no {stems[i]}.npy")
    return _checked(_row(files[stems[i]]), width, str(files[stems[i]]))


def _row_of_table(table: np.ndarray, i: int, width: int) -> np.ndarray:
    return _checked(table[i], width, f"row {i}")


def _checked(row: np.ndarray, width: int, name: str) -> np.ndarray:
    if len(row) != width:
        raise ConfigError(f"from_npy: {name} has {len(row)} numbers, others {width}")
    if not np.isfinite(row).all():
        raise BadSample(f"{name} is not finite")
    return row


def _row(path: Path) -> np.ndarray:
    """[d] of a file that holds [d], or [1, d]."""
    found = _load(path)
    if found.ndim == 0 or found.size != found.shape[-1]:
        raise ConfigError(f"from_npy: {path} holds an array {list(found.shape)}: one row of features is needed")
    return found.reshape(-1)


def _table(path: Path) -> np.ndarray:
    found = _load(path, mmap_mode="r")
    if found.ndim != 2:
        raise ConfigError(f"from_npy={path}: an array {list(found.shape)}: [samples, d] is needed")
    return found


def _load(path: Path, **options) -> np.ndarray:
    try:
        found = np.load(path, allow_pickle=False, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"from_npy: {path} cannot be read: {error}") from None
    if not np.issubdtype(found.dtype, np.floating):
        raise ConfigError(f"from_npy: {path} holds {found.dtype}, not numbers of features")
    return found


def _stems(source: Source) -> list[str]:
    """Of every sample's key. Raises ConfigError where two share one: nobody could tell their files apart."""
    stems = [PurePosixPath(source.key(i)).stem for i in range(source.num_samples)]
    if twice := [stem for stem, count in Counter(stems).items() if count > 1]:
        keys = [source.key(i) for i, stem in enumerate(stems) if stem == twice[0]]
        raise ConfigError(f"data: {len(keys)} samples would share {twice[0]}.npy: {', '.join(keys[:3])}; use one .npy")
    return stems


def _save(path: Path, rows: np.ndarray) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, rows)
