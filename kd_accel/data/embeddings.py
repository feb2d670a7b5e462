"""A teacher's features on disk, by sample: what `kd-accel embed` writes and training reads in the teacher's place.

    STORE/store.json           whose features they are, of which views and captions (StoreInfo)
    STORE/NNNNN.safetensors    one per shard of the data, of the same name; rows in the shard's order
        image        [n, V, d]     of each of V views
        text         [m, d]        of every text of every sample, one sample's after the other's
        text_starts  [n + 1]       where each sample's texts begin
        *_scale      [n, V], [m]   int8 only: what a row's integers are multiplied by

A file holds the SHA-256 of its samples' keys, and is complete or absent. n samples, m texts, V views, d width.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kd_accel.augment_config import AugmentConfig
from kd_accel.data.source import Source
from kd_accel.data.views import Views
from kd_accel.schema import ConfigError, LocalError

INFO = "store.json"
FORMAT = "kd_accel.store/1"
MAX_OPEN = 64  # shards per process
TOWERS = ("image", "text")


@dataclass(frozen=True)
class StoreInfo:
    """What has to be alike for stored features to stand for a live teacher's."""

    teacher: dict[str, Any]  # the section that named it: arch, pretrained, path
    weights_sha256: str
    preprocess_sha256: str  # of its input contract
    embed_dim: int
    logit_scale: float
    logit_bias: float | None
    towers: list[str]
    views: dict[str, Any] | None  # of the images: size, augment, seed, count
    templates: list[str]  # of the captions
    dtype: str  # fp16 | bf16 | int8
    format: str = FORMAT

    def write(self, folder: Path) -> None:
        """STORE/store.json, atomically."""
        temporary = folder / f".{INFO}.tmp"
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, folder / INFO)

    @staticmethod
    def read(folder: Path, key: str) -> StoreInfo:
        """Raises ConfigError, which begins with `key`, where there is no readable store."""
        try:
            values = json.loads((folder / INFO).read_text(encoding="utf-8"))
            info = StoreInfo(**values)
        except FileNotFoundError:
            raise ConfigError(f"{key}: {folder} holds no {INFO}: make the store with kd-accel embed") from None
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{key}: {folder / INFO} cannot be read: {error}") from None
        if info.format != FORMAT:
            raise ConfigError(f"{key}: {folder} is a store of format {info.format}, this version reads {FORMAT}")
        return info


class EmbeddingStore:
    """Stored features of the samples of a source. Picklable; a process maps a shard's file when it first reads it.

    info     whose features they are
    towers   of "image" and "text" those that are read
    views    how the views were made that the image features are of; None without image features
    """

    def __init__(self, folder: str | Path, *, key: str = "teacher.store", towers: set[str] | None = None):
        """`key` is the config's; `towers`: what to read of what there is. Raises ConfigError for no usable store."""
        self.folder, self._key = Path(folder), key
        self.info = StoreInfo.read(self.folder, key)
        self.towers = set(self.info.towers) & (set(TOWERS) if towers is None else towers)
        self.views = None if self.info.views is None else views_of(self.info.views)
        self._source: Source | None = None
        self._starts, self._names = np.zeros(1, dtype=np.int64), []
        self._open: dict[int, dict[str, np.ndarray]] = {}  # shard -> arrays, least recently used first

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}

    def attach(self, source: Source, templates: list[str]) -> None:
        """Say whose samples they are. Raises ConfigError where a shard is not in the store, or not as it was stored."""
        if "text" in self.towers and templates != self.info.templates:
            raise ConfigError(
                f"{self._key}: the store holds captions in the templates {self.info.templates}, data.templates is"
                f" {templates}: take the store's, or embed again"
            )
        self._source, self._names = source, shard_names(source)
        self._starts = np.concatenate([[0], np.cumsum(source.shard_sizes)])
        missing = [name for name in self._names if not (self.folder / name).is_file()]
        if missing:
            raise ConfigError(
                f"{self._key}: {len(missing)} of {len(self._names)} shards of the data are not in {self.folder}, the"
                f" first is {missing[0]}: run kd-accel embed again, which goes on where it stopped"
            )
        self._map(0)

    def read(self, ids: np.ndarray, *, view: int, texts: np.ndarray) -> dict[str, Tensor]:
        """{"image": [b, d], "text": [b, d]} of samples `ids` [b].

        `view` is counted modulo V, `texts` [b] are the numbers of the samples' texts. Raises LocalError for a damaged
        file, or one of other samples.
        """
        shards = np.searchsorted(self._starts, ids, side="right") - 1
        found: dict[str, Tensor] = {}
        for shard in np.unique(shards):
            arrays, mine = self._map(int(shard)), np.flatnonzero(shards == shard)
            rows = ids[mine] - self._starts[shard]
            for tower in self.towers:
                place = (
                    (rows, view % arrays["image"].shape[1])
                    if tower == "image"
                    else arrays["text_starts"][rows] + texts[mine]
                )
                values = self._values(arrays, tower, place)
                if tower not in found:
                    found[tower] = values.new_empty(len(ids), values.shape[1])
                found[tower][torch.from_numpy(mine)] = values
        return found

    def _values(self, arrays: dict[str, np.ndarray], tower: str, place) -> Tensor:
        values = torch.from_numpy(np.ascontiguousarray(arrays[tower][place]))
        match self.info.dtype:
            case "bf16":
                return values.view(torch.bfloat16)  # numpy has no bf16: the bits were mapped as int16
            case "int8":
                return values.float() * torch.from_numpy(np.ascontiguousarray(arrays[f"{tower}_scale"][place]))[:, None]
        return values

    def _map(self, shard: int) -> dict[str, np.ndarray]:
        if shard in self._open:
            self._open[shard] = self._open.pop(shard)  # now the most recently used
            return self._open[shard]
        if len(self._open) == MAX_OPEN:
            self._open.pop(next(iter(self._open)))
        path = self.folder / self._names[shard]
        arrays, metadata = map_file(path, self._key)
        ids = range(int(self._starts[shard]), int(self._starts[shard + 1]))
        if metadata.get("keys_sha256") != keys_sha256(self._source, ids):
            raise LocalError(
                f"{self._key}: {path} holds features of other samples than {self._source.shard(ids[0])}: the shard was"
                " replaced or packed again; delete the file and run kd-accel embed again"
            )
        self._open[shard] = arrays
        return arrays


def views_of(values: dict[str, Any]) -> Views:
    """Views as store.json describes them."""
    return Views(tuple(values["size"]), AugmentConfig(**values["augment"]), values["seed"], values["count"])


def shard_names(source: Source) -> list[str]:
    """A file name for each shard: its own file's; blocks of one file, and files of one name, are numbered."""
    starts = np.concatenate([[0], np.cumsum(source.shard_sizes)])[:-1]
    stems = [Path(source.shard(int(start))).stem for start in starts]
    total, seen, names = Counter(stems), Counter(), []
    for stem in stems:
        names.append(f"{stem}.safetensors" if total[stem] == 1 else f"{stem}-{seen[stem]:05d}.safetensors")
        seen[stem] += 1
    return names


def keys_sha256(source: Source, ids: range) -> str:
    """Of the keys of some samples, in order."""
    return hashlib.sha256("\n".join(source.key(i) for i in ids).encode("utf-8", "backslashreplace")).hexdigest()


def map_file(path: Path, key: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays by name, mapped and not read, metadata) of a safetensors file; raises LocalError for a damaged one."""
    try:
        with safe_open(path, framework="np") as file:  # checks sizes and offsets
            metadata = file.metadata() or {}
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (OSError, SafetensorError, ValueError) as error:
        raise LocalError(f"{key}: {path} cannot be read ({error}): delete it and run kd-accel embed again") from None
    header.pop("__metadata__", None)
    return {
        name: np.memmap(
            path,
            dtype=_NUMPY[entry["dtype"]],
            mode="r",
            offset=8 + length + entry["data_offsets"][0],
            shape=tuple(entry["shape"]),
        )
        for name, entry in header.items()
    }, metadata


_NUMPY = {"F16": np.float16, "BF16": np.int16, "I8": np.int8, "F32": np.float32, "I64": np.int64}
