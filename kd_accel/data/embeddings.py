"""A teacher's features on disk, by sample: what `kd-accel embed` writes and training reads in the teacher's place.

n samples of a shard, V views, b rows that are asked for, d width; store_files.py says what a store's files hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kd_accel.data.source import BadSample, Source
from kd_accel.data.store_files import (
    Shard,
    StoreInfo,
    captions_of,
    keys_sha256,
    map_shard,
    shard_names,
    shard_starts,
    views_of,
)
from kd_accel.data_config import DataConfig
from kd_accel.schema import ConfigError, LocalError

MAX_OPEN = 64  # shards per process
TOWERS = ("image", "text")
Place = np.ndarray | tuple[np.ndarray, int]  # of rows [b] in a shard's features: texts; samples, and a view


class EmbeddingStore:
    """Stored features of the samples of a source. Picklable; a process maps a shard's file when it first reads it.

    info     whose features they are
    towers   of "image" and "text" those that are read
    views    the views that the image features are of; None where none are read, and for features of other programs
    """

    def __init__(self, folder: str | Path, *, key: str = "teacher.store", towers: set[str] | None = None):
        """`key` is the config's; `towers`: what to read of what there is. Raises ConfigError for no usable store."""
        self.folder, self._key = Path(folder), key
        self.info = StoreInfo.read(self.folder, key)
        self.towers = set(self.info.towers) & (set(TOWERS) if towers is None else towers)
        known = self.info.views if "image" in self.towers else None
        self.views = None if known is None else views_of(known)
        self._sha256 = self.info.sha256()
        self._source: Source  # from attach() on
        self._starts, self._names = np.zeros(1, dtype=np.int64), list[str]()
        self._open: dict[int, Shard] = {}  # least recently used first
        self._checked: set[int] = set()  # shards whose samples are the source's

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}

    def attach(self, source: Source, data: DataConfig | None) -> None:
        """Say whose samples they are; `data`: where their texts come from, None where no text features are read.

        Raises ConfigError where a shard is not in the store, or not as it was stored.
        """
        if data is not None and "text" in self.towers and captions_of(data) != self.info.captions:
            raise ConfigError(
                f"{self._key}: the store holds texts of {_words(self.info.captions)}, this run has"
                f" {_words(captions_of(data))}: take the store's, or embed again"
            )
        self._source, self._names, self._starts = source, shard_names(source), shard_starts(source)
        missing = [name for name in self._names if not (self.folder / name).is_file()]
        if missing:
            raise ConfigError(
                f"{self._key}: {len(missing)} of {len(self._names)} shards of the data are not in {self.folder}, the"
                f" first is {missing[0]}: run kd-accel embed again, which goes on where it stopped"
            )
        self._map(0)

    def check(self, sample_id: int) -> None:
        """Raises BadSample for a sample that could not be read when the store was made, with the reason of then."""
        shard = self._shard_of(sample_id)
        if (reason := self._map(shard).bad.get(sample_id - int(self._starts[shard]))) is not None:
            raise BadSample(reason)

    def read(self, ids: np.ndarray, *, view: int, texts: np.ndarray) -> dict[str, Tensor]:
        """{"image": [b, d], "text": [b, d]} of samples `ids` [b], of which none is bad.

        `view` is counted modulo V, `texts` [b] are the numbers of the samples' texts. Raises LocalError for a damaged
        file, one of other samples, and a text that was not stored.
        """
        shards = np.searchsorted(self._starts, ids, side="right") - 1
        found: dict[str, Tensor] = {}
        for shard in np.unique(shards):
            arrays, mine = self._map(int(shard)).arrays, np.flatnonzero(shards == shard)
            rows = ids[mine] - self._starts[shard]
            for tower in self.towers:
                place: Place
                if tower == "image":
                    place = rows, view % arrays["image"].shape[1]
                else:
                    place = self._text_rows(arrays["text_starts"], rows, texts[mine], int(shard))
                values = self._values(arrays, tower, place)
                if tower not in found:
                    found[tower] = values.new_empty(len(ids), values.shape[1])
                found[tower][torch.from_numpy(mine)] = values
        return found

    def bad_samples(self) -> Iterator[dict]:
        """{id, key, shard, reason} of every sample that could not be read when the store was made."""
        for shard, start in enumerate(self._starts[:-1]):
            for row, reason in self._map(shard).bad.items():
                i = int(start) + row
                yield {"id": i, "key": self._source.key(i), "shard": self._source.shard(i), "reason": reason}

    def _shard_of(self, sample_id: int) -> int:
        return int(np.searchsorted(self._starts, sample_id, side="right")) - 1

    def _text_rows(self, starts: np.ndarray, rows: np.ndarray, texts: np.ndarray, shard: int) -> np.ndarray:
        found: np.ndarray = starts[rows] + texts
        if (outside := np.flatnonzero(found >= starts[rows + 1])).size:
            sample = int(self._starts[shard] + rows[outside[0]])
            raise LocalError(
                f"{self._key}: sample {self._source.key(sample)} in {self._source.shard(sample)} has more texts than"
                f" {self.folder} holds of it: its captions changed; delete {self._names[shard]} there and embed again"
            )
        return found

    def _values(self, arrays: dict[str, np.ndarray], tower: str, place: Place) -> Tensor:
        values = torch.from_numpy(arrays[tower][place])
        match self.info.dtype:
            case "bf16":
                return values.view(torch.bfloat16)  # numpy has no bf16: the bits were mapped as int16
            case "int8":
                return values.float() * torch.from_numpy(arrays[f"{tower}_scale"][place])[:, None]
        return values

    def _map(self, shard: int) -> Shard:
        if shard in self._open:
            self._open[shard] = self._open.pop(shard)  # now the most recently used
            return self._open[shard]
        if len(self._open) == MAX_OPEN:
            self._open.pop(next(iter(self._open)))
        path = self.folder / self._names[shard]
        mapped = map_shard(path, self._key)
        if shard not in self._checked:
            if problem := self._problem(shard, mapped.metadata):
                raise LocalError(f"{self._key}: {path} {problem}; delete the file and run kd-accel embed again")
            self._checked.add(shard)
        self._open[shard] = mapped
        return mapped

    def _problem(self, shard: int, metadata: dict) -> str | None:
        """What is wrong with a file: whether it belongs to this store, and to these samples."""
        ids = range(int(self._starts[shard]), int(self._starts[shard + 1]))
        if metadata.get("store_sha256") != self._sha256:
            return "belongs to another store"
        if metadata.get("keys_sha256") != keys_sha256(self._source, ids):
            return (
                f"holds features of other samples than {self._source.shard(ids[0])}, which was replaced or packed anew"
            )
        if self.views is not None and metadata.get("first_id") != ids[0]:
            return (
                f"holds features of views that were drawn for samples {metadata.get('first_id')}, ..., which are now"
                f" {ids[0]}, ...: shards before it were added or dropped"
            )
        return None


def _words(captions: dict | None) -> str:
    """Of StoreInfo.captions."""
    if captions is None:
        return "no known captions"
    fields = [" + ".join(str(name) for name in given if name) for given in captions["fields"]]
    return f"data.templates={captions['templates']} with data.caption={', '.join(fields)}"
