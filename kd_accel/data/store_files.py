"""The files of an embedding store: what they are called, what they hold, how they are written and mapped.

    STORE/store.json           whose features they are, of which views and captions (StoreInfo)
    STORE/NNNNN.safetensors    one per shard of the data, of the same name; rows in the shard's order
        image        [n, V, d]     of each of V views
        text         [m, d]        of every text of every sample, one sample's after the other's
        text_starts  [n + 1]       where each sample's texts begin
        *_scale      [n, V], [m]   int8 only: what a row's integers are multiplied by

A file is complete or absent. In its metadata: the SHA-256 of store.json and of its samples' keys, the number of its
first sample, and the samples that could not be read, whose image rows are nan and whose texts are none.
n samples, m texts, V views, d width.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kd_accel.augment_config import AugmentConfig
from kd_accel.config import sources_of
from kd_accel.data.source import Source
from kd_accel.data.views import Views
from kd_accel.data_config import DataConfig
from kd_accel.schema import ConfigError, LocalError
from kd_accel.text_files import replace_text
from kd_accel.whole_files import replacing

INFO = "store.json"
FORMAT = "kd_accel.store/1"
METADATA = "kd_accel"  # one text of JSON: safetensors writes several in an order of its own each time
_NUMPY = {"F16": np.float16, "BF16": np.int16, "I8": np.int8, "F32": np.float32, "I64": np.int64}


@dataclass(frozen=True)
class StoreInfo:
    """What has to be alike for stored features to stand for a live teacher's."""

    teacher: dict[str, Any]  # the section that named it: arch, pretrained, path
    weights_sha256: str | None  # None: the features came from files of another program, and nobody knows
    preprocess_sha256: str | None  # of its input contract
    embed_dim: int
    logit_scale: float | None
    logit_bias: float | None
    teacher_towers: list[str]  # that it has
    towers: list[str]  # that are stored
    views: dict[str, Any] | None  # of the images: size, augment, seed, count; None: of whole images, not made by us
    captions: dict[str, Any] | None  # templates, and the fields they come from
    precision: str  # of the teacher: bf16 | fp32
    dtype: str  # of the rows: fp16 | bf16 | int8
    format: str = FORMAT

    def write(self, folder: Path) -> None:
        """STORE/store.json, complete or not at all."""
        replace_text(folder / INFO, json.dumps(asdict(self), indent=1) + "\n")

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

    def sha256(self) -> str:
        """Ties the files of a store to its store.json."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Shard:
    """A mapped file."""

    arrays: dict[str, np.ndarray]  # by name
    metadata: dict[str, Any]
    bad: dict[int, str]  # row -> why the sample could not be read


def views_of(values: dict[str, Any]) -> Views:
    """Views as store.json describes them."""
    return Views(tuple(values["size"]), AugmentConfig(**values["augment"]), values["seed"], values["count"])


def captions_of(data: DataConfig) -> dict[str, Any]:
    """What decides a sample's texts, as store.json describes it."""
    fields = [[source.caption, source.synthetic] for source in sources_of(data).values()]
    return {"templates": data.templates, "fields": fields}


def shard_starts(source: Source) -> np.ndarray:
    """[shards + 1] int64: the number of each shard's first sample, and of all samples."""
    return np.concatenate([[0], np.cumsum(source.shard_sizes)]).astype(np.int64)


def shard_names(source: Source) -> list[str]:
    """A file name for each shard: its own file's; blocks of one file, and files of one name, are numbered."""
    stems = [Path(source.shard(int(start))).stem for start in shard_starts(source)[:-1]]
    total, seen, names = Counter(stems), Counter[str](), []
    for stem in stems:
        names.append(f"{stem}.safetensors" if total[stem] == 1 else f"{stem}-{seen[stem]:05d}.safetensors")
        seen[stem] += 1
    return names


def keys_sha256(source: Source, ids: range) -> str:
    """Of the keys of some samples, in order."""
    return hashlib.sha256("\n".join(source.key(i) for i in ids).encode("utf-8", "backslashreplace")).hexdigest()


def pack_rows(rows: Tensor, dtype: str) -> tuple[Tensor, Tensor | None]:
    """fp32 `rows[..., d]` -> (as they are stored, what int8 rows are multiplied by [...] fp32, else None).

    int8 is symmetric per row: a number is off by at most 1/254 of the row's largest. Rows that are not finite stay so.
    Raises ConfigError for numbers that fp16 cannot hold.
    """
    if dtype == "int8":
        scale = rows.abs().amax(dim=-1) / 127
        integers = (rows / scale.clamp_min(torch.finfo(scale.dtype).tiny)[..., None]).round()
        return integers.nan_to_num(0, 0, 0).to(torch.int8), scale
    packed = rows.to(torch.bfloat16 if dtype == "bf16" else torch.float16)
    if (packed.isinf() & ~rows.isinf()).any():
        raise ConfigError(f"dtype=fp16 holds numbers up to 65504, a feature is {rows.abs().nan_to_num().max():.3g}")
    return packed, None


def save_shard(path: Path, features: dict[str, Tensor], *, dtype: str, starts: Tensor | None, **metadata: Any) -> None:
    """Write a file, complete or not at all.

    `features`: fp32 image [n, V, d], text [m, d]; `starts` [n + 1] int64 of the texts. `metadata`: what Shard and the
    store check it by; `bad` is {row: reason}.
    """
    tensors = {} if starts is None else {"text_starts": starts}
    for tower, rows in features.items():
        packed, scale = pack_rows(rows, dtype)
        tensors |= {tower: packed.contiguous()} | ({} if scale is None else {f"{tower}_scale": scale.contiguous()})
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={METADATA: json.dumps(metadata)})
        temporary.chmod(0o644)  # safetensors makes files that only their owner can read


def map_shard(path: Path, key: str) -> Shard:
    """The file, mapped and not read; raises LocalError, which begins with `key`, for a damaged one."""
    try:
        with safe_open(path, framework="np"):  # checks sizes and offsets
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        metadata = json.loads(header.pop("__metadata__")[METADATA])
        bad = {int(row): reason for row, reason in metadata["bad"].items()}
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise LocalError(f"{key}: {path} cannot be read ({error}): delete it and run kd-accel embed again") from None
    whole = np.memmap(path, mode="r", dtype=np.uint8, offset=0)  # one open file, whatever the number of arrays
    arrays = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        arrays[name] = np.asarray(whole[begin:end]).view(_NUMPY[entry["dtype"]]).reshape(entry["shape"])
    return Shard(arrays, metadata, bad)
