"""kd-accel index: where every sample's members lie inside its tar, so that any sample is one `pread` away.

    kd-accel index "datasets/dfn/{00000..00139}.tar"

NNNNN.tar gets NNNNN.idx.npz beside it (numpy arrays only, never a pickle), and every folder a manifest.json. A sample
is a run of consecutive members that share folder and name up to the first dot, as in webdataset; its id is its row over
all shards in the order in which they are given. N samples, n samples and E extensions of one tar.
"""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from kd_accel.data.braces import expand_braces
from kd_accel.data.scan import Samples, scan
from kd_accel.schema import ConfigError
from kd_accel.text_files import replace_text
from kd_accel.whole_files import replacing

SIDECAR = ".idx.npz"  # instead of .tar
MAX_EXTENSIONS = 64  # per tar; more means that the names carry a dot before the extension


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Every sample's place. Arrays only: reference counts of Python lists un-share the pages of forked workers."""

    starts: np.ndarray  # [shards + 1] int64, id of each shard's first sample, then N
    offsets: np.ndarray  # [N, m] int64, bytes from the start of the tar to each wanted member; -1 where absent
    sizes: np.ndarray  # [N, m] int64, their bytes
    keys: np.ndarray  # [N] bytes, UTF-8

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.keys)

    @property
    def shard_sizes(self) -> np.ndarray:
        """[shards] int64, samples of each shard."""
        return np.diff(self.starts)


def expand_shards(shards: str | list[str]) -> list[Path]:
    """The tars that `shards` names, in order: brace ranges are expanded, a folder stands for its *.tar sorted by name.

    Raises ConfigError for a shard that is missing, given twice or not a .tar, and for a folder without tars.
    """
    paths = [path for name in expand_braces(shards, "data.shards") for path in _tars_of(Path(name))]
    if not paths:
        raise ConfigError("data.shards: names no shard")
    if other := [path for path in paths if path.suffix != ".tar"]:
        if not other[0].exists():
            raise ConfigError(f"data.shards: {other[0]}: no such folder; give a folder of .tar files, or their names")
        raise ConfigError(f"data.shards: {other[0]} is not a .tar; a compressed tar must be unpacked to .tar first")
    if missing := [path for path in paths if not path.is_file()]:
        raise ConfigError(f"data.shards: {len(missing)} of {len(paths)} shards do not exist, the first is {missing[0]}")
    seen = set()
    for path in paths:
        if (absolute := os.path.abspath(path)) in seen:
            raise ConfigError(f"data.shards: {path} is given twice")
        seen.add(absolute)
    return paths


def build_index(paths: list[Path], *, progress: bool = False) -> tuple[int, int]:
    """Write the sidecar of every tar in `paths` that has no current one, and the manifest of every folder.

    Returns (tars read by this call, samples in all of `paths`). `progress` shows a bar on a terminal.
    Raises ConfigError for a damaged tar and for a folder that cannot be written.
    """
    stale = [path for path in paths if not _is_current(path)]
    for folder in {path.parent for path in stale}:
        _require_writable(folder)
    for path in tqdm(stale, desc="index", unit="shard", disable=None if progress else True):
        write_index(path)
    for folder in {path.parent for path in paths}:
        _write_manifest(folder)
    return len(stale), sum(map(num_indexed, paths))


def write_index(path: Path) -> None:
    """Write the sidecar of one tar; raises ConfigError for a damaged one."""
    _write_sidecar(path, scan(path))


def num_indexed(path: Path) -> int:
    """Samples of an indexed tar."""
    return len(read_sidecar(path, "sizes")[0])


def load_index(paths: list[Path], members: list[tuple[str, tuple[str, ...]]]) -> ShardIndex:
    """The samples of `paths`. `members`: (key of the config, extensions of which the first that is there counts) each.

    Raises ConfigError when a tar has no index or another size than when it was indexed, when there is no sample at all,
    and when no sample has a wanted member.
    """
    shards = [_load_shard(path, [wanted for _, wanted in members]) for path in paths]
    extensions = sorted({extension for *_, names in shards for extension in names})
    offsets, sizes, keys = (np.concatenate([shard[part] for shard in shards]) for part in range(3))
    if not len(keys):
        raise ConfigError(f"data.shards: no sample in {len(paths)} shards, the first is {paths[0]}")
    for column, (key, wanted) in enumerate(members):
        if (offsets[:, column] < 0).all():
            found = ", ".join(extensions[:10])
            raise ConfigError(f"{key}: no sample has a member .{' or .'.join(wanted)}; the shards have {found}")
    starts = np.cumsum([0, *(len(shard[2]) for shard in shards)], dtype=np.int64)
    return ShardIndex(starts, offsets, sizes, keys)


def _tars_of(path: Path) -> list[Path]:
    """A tar, or those of a folder."""
    # macOS leaves ._NAME.tar beside every tar that it unpacks
    found = sorted(tar for tar in path.glob("*.tar") if tar.name[0] != ".") if path.is_dir() else [path]
    if not found:
        raise ConfigError(f"data.shards: the folder {path} holds no .tar")
    return found


def _sidecar(path: Path) -> Path:
    return path.with_suffix(SIDECAR)


def _is_current(path: Path) -> bool:
    """Whether the tar has an index that is no older than it and was made at its present size."""
    sidecar, tar = _sidecar(path), path.stat()
    if not sidecar.exists() or sidecar.stat().st_mtime_ns < tar.st_mtime_ns:
        return False
    try:
        return int(read_sidecar(path, "tar_bytes")[0]) == tar.st_size
    except ConfigError:  # unreadable: written anew
        return False


def _require_writable(folder: Path) -> None:
    """Asked before the first pass, not after it."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"{folder}: the index belongs beside the tars, but this folder cannot be written ({error.strerror}): "
            "copy or symlink the tars into a folder of your own and index that"
        ) from None


def _write_sidecar(path: Path, samples: Samples) -> None:
    extensions = sorted({extension for _, members in samples for extension in members})
    if len(extensions) > MAX_EXTENSIONS:
        raise ConfigError(
            f"{path}: {len(extensions)} different extensions, for instance .{extensions[0]}: the extension starts at "
            "the first dot of a name, so pack the tar again with no other dot in its names"
        )
    absent = (-1, 0)
    places = [[members.get(extension, absent) for extension in extensions] for _, members in samples]
    table = np.array(places, dtype=np.int64).reshape(len(samples), len(extensions), 2)  # [n, E, (offset, size)]
    arrays: dict[str, Any] = {
        "keys": np.array([key.encode("utf-8", "surrogateescape") for key, _ in samples], dtype=np.bytes_),
        "extensions": np.array(extensions, dtype=np.str_),
        "offsets": table[..., 0],
        "sizes": table[..., 1],
        "tar_bytes": np.int64(path.stat().st_size),
    }
    with replacing(_sidecar(path)) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def _write_manifest(folder: Path) -> None:
    """List every indexed tar of `folder`, also those of earlier calls."""
    tars = [tar for tar in sorted(folder.glob("*.tar")) if _sidecar(tar).exists()]
    rows: list[dict[str, Any]] = []
    for tar in tars:
        sizes, tar_bytes = read_sidecar(tar, "sizes", "tar_bytes")
        rows.append({"file": tar.name, "samples": len(sizes), "bytes": int(tar_bytes)})
    manifest = {"samples": sum(row["samples"] for row in rows), "shards": rows}
    text = json.dumps(manifest, indent=1) + "\n"
    path = folder / "manifest.json"
    if not path.exists() or path.read_bytes() != text.encode():  # a folder that is indexed may be read-only
        _require_writable(folder)
        replace_text(path, text)


def _load_shard(path: Path, members: list[tuple[str, ...]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """(offsets [n, m], sizes [n, m], keys [n], extensions) of one tar; of each member's extensions the first counts."""
    if not _sidecar(path).exists():
        raise ConfigError(f"{path}: has no index: run kd-accel index {path.parent}")
    keys, names, offsets, sizes, indexed = read_sidecar(path, "keys", "extensions", "offsets", "sizes", "tar_bytes")
    # a remote tar comes when it is read, and is compared then
    if path.exists() and (size := path.stat().st_size) != indexed:
        raise ConfigError(
            f"{path}: has {size:,} bytes but had {indexed:,} when it was indexed, so it was truncated or replaced: "
            f"fetch it again, or run kd-accel index {path.parent}"
        )
    if ((sizes < 0) | (sizes > indexed) | (offsets > indexed - sizes)).any():
        raise ConfigError(f"{_sidecar(path)}: places members outside of the tar: delete it and index the tar again")
    extensions = names.tolist()
    shape = len(keys), len(members)
    chosen = np.full(shape, -1), np.zeros(shape, dtype=np.int64)
    for column, wanted in enumerate(members):
        for extension in [name for name in reversed(wanted) if name in extensions]:
            place = extensions.index(extension)
            present = offsets[:, place] >= 0
            for target, source in zip(chosen, (offsets, sizes), strict=True):
                target[present, column] = source[present, place]
    return *chosen, keys, extensions


def read_sidecar(path: Path, *names: str) -> list[np.ndarray]:
    """The arrays `names` of the index of the tar `path`."""
    try:
        with _sidecar(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return [arrays[name] for name in names]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, MemoryError) as error:
        raise ConfigError(
            f"{_sidecar(path)}: cannot be read ({error}): delete it and run kd-accel index {path.parent}"
        ) from None
