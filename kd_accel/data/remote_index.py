"""The index of remote tars: which tars a config names, and their sidecars on this disk before the tars are.

Every folder's manifest.json is asked for once; sidecars come in many small requests at a time.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from kd_accel.data.braces import expand_braces
from kd_accel.data.cache import ShardCache
from kd_accel.data.index import SIDECAR, num_indexed, read_sidecar, write_index
from kd_accel.data.remote import describe, list_folder, read_bytes
from kd_accel.data.urls import beside, file_name, is_remote, shown
from kd_accel.schema import ConfigError
from kd_accel.whole_files import replacing

SMALL_FILES_AT_A_TIME = 16
_TAR = re.compile(r"[^/\\\x00]+\.tar")


def expand_urls(shards: str | list[str], cache: ShardCache) -> list[str]:
    """The URLs of tars that `shards` names, in order: brace ranges are expanded, a folder stands for its tars by name.

    A folder's tars are those of its manifest.json; without one an object store is asked for a list.
    Raises ConfigError for what is no tar, given twice, or a folder without tars.
    """
    names = expand_braces(shards, "data.shards")
    urls = [url for name in names for url in ([name] if file_name(name).endswith(".tar") else _tars_of(name, cache))]
    if mixed := [url for url in urls if not is_remote(url)]:
        raise ConfigError(
            f"data.shards: {mixed[0]} is local, others are remote: give all of one kind (or data.sources)"
        )
    if twice := [url for k, url in enumerate(urls) if url in urls[:k]]:
        raise ConfigError(f"data.shards: {shown(twice[0])} is given twice")
    return urls


def index_remote(shards: str | list[str], cache: ShardCache) -> tuple[int, int, int]:
    """Index remote tars that have no index: each is fetched once through the cache, and its index stays there.

    Returns (tars indexed by this call, tars, samples of all).
    """
    urls = expand_urls(shards, cache)
    missing = fetch_sidecars(urls, cache)
    for url in tqdm(missing, desc="index", unit="shard", disable=None):
        write_index(cache.fetch(url, describe(url, cache.patience).size))
    return len(missing), len(urls), sum(num_indexed(cache.place(url)) for url in urls)


def fetch_sidecars(urls: list[str], cache: ShardCache) -> list[str]:
    """Put the current index of every tar where the tar will be; the URLs that have none anywhere."""
    folders: dict[str, list[str]] = {}
    for url in urls:
        folders.setdefault(beside(url, ""), []).append(url)
    return [url for group in folders.values() for url in _fetch_folder(group, cache)]


def _fetch_folder(urls: list[str], cache: ShardCache) -> list[str]:
    folder = cache.place(urls[0]).parent
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".index.lock"):  # the other processes of this machine find it done
        rows = _fetch_manifest(urls[0], cache)
        stale = [url for url in urls if not _is_indexed(cache.place(url), rows)]
        with ThreadPoolExecutor(SMALL_FILES_AT_A_TIME) as pool:
            had = pool.map(lambda url: _fetch_sidecar(url, cache), stale)
            found = dict(zip(stale, tqdm(had, "index", len(stale), unit="shard", disable=None), strict=True))
    return [url for url in urls if not found.get(url, True)]


def _fetch_manifest(url: str, cache: ShardCache) -> dict[str, dict]:
    """{file: {samples, bytes (, sha256)}} of the remote folder's manifest.json, which is kept; {} without one."""
    content = read_bytes(beside(url, "manifest.json"), cache.patience)
    path = cache.place(url).with_name("manifest.json")
    if content is None:
        path.unlink(missing_ok=True)
        return {}
    rows = _rows(content, shown(beside(url, "manifest.json")))
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return rows


def _rows(manifest: bytes, name: str) -> dict[str, dict]:
    try:
        rows = {row["file"]: row for row in json.loads(manifest)["shards"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{name}: not a manifest of kd-accel index ({type(error).__name__}: {error})") from None
    if other := [file for file in rows if not isinstance(file, str) or not _TAR.fullmatch(file)]:
        raise ConfigError(f"{name}: {other[0]!r} is not the name of a tar beside it")
    return rows


def checksums(folder: Path) -> dict[str, str]:
    """{tar: its SHA-256} of those for which the folder's manifest has one. Raises ConfigError for another manifest."""
    manifest = folder / "manifest.json"
    rows = _rows(manifest.read_bytes(), str(manifest)) if manifest.exists() else {}
    return {file: row["sha256"] for file, row in rows.items() if "sha256" in row}


def _is_indexed(path: Path, rows: dict[str, dict]) -> bool:
    """Whether the sidecar of `path` is here and fits the remote manifest; without a manifest, what is here counts."""
    if not path.with_suffix(SIDECAR).exists():
        return False
    sizes, tar_bytes = read_sidecar(path, "sizes", "tar_bytes")
    row = rows.get(path.name, {"samples": len(sizes), "bytes": tar_bytes})
    return (row["samples"], row["bytes"]) == (len(sizes), tar_bytes)


def _fetch_sidecar(url: str, cache: ShardCache) -> bool:
    """Fetch the sidecar; the tar beside an older one goes. False: there is none."""
    path = cache.place(url)
    content = read_bytes(beside(url, path.with_suffix(SIDECAR).name), cache.patience)
    if content is None:
        return False
    with replacing(path.with_suffix(SIDECAR)) as temporary:
        temporary.write_bytes(content)
    path.unlink(missing_ok=True)
    return True


def _tars_of(folder: str, cache: ShardCache) -> list[str]:
    inside = beside(folder if file_name(folder) == "" else beside(folder, file_name(folder) + "/"), "manifest.json")
    content = read_bytes(inside, cache.patience)
    if content is not None:
        urls = [beside(inside, file) for file in sorted(_rows(content, shown(inside)))]
    elif folder.startswith("http"):
        raise ConfigError(
            f"data.shards: {shown(folder)}: a web server does not list its files: name the tars, as in "
            f"{shown(beside(inside, '{00000..00139}.tar'))}, or put the manifest.json of kd-accel index beside them"
        )
    else:
        urls = list_folder(folder, cache.patience)
    if not urls:
        raise ConfigError(f"data.shards: the folder {shown(folder)} holds no .tar")
    return urls
