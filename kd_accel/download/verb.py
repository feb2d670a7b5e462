"""kd-accel download: the images of a list of URLs as indexed shards.

    kd-accel download Train_GCC-training.tsv out=datasets/cc3m short_side=256 user_agent="name (mail@example.org)"

Shard k takes rows k x rows_per_shard and on. Its images lie in FOLDER/.NNNNN until all of its rows are done, then it
becomes NNNNN.tar; a run that was ended goes on there. For many millions of URLs there is img2dataset.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from kd_accel.data.index import build_index, expand_shards
from kd_accel.data.resize import describe, resized
from kd_accel.data.source import BadSample
from kd_accel.download.urls import Row, read_urls
from kd_accel.download.web import Failure, Web
from kd_accel.download_config import DownloadConfig
from kd_accel.schema import ConfigError

Work = list[tuple[str, Row]]  # (key, row) of one shard
Record = dict[str, Any]  # of a row that failed: shard, key, url, kind, reason


def run(config: DownloadConfig) -> None:
    """Fetch what is not there yet, index the shards, and say what became of all rows.

    Raises ConfigError for a list that cannot be read, and a folder that holds something else or is being written.
    """
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".download.lock", blocking=False):
            _claim(folder, config)
            failures = _whole_shards(folder)
            asyncio.run(_download(config, folder, failures))
    except Timeout:
        raise ConfigError(f"out: {folder}: another download is writing there") from None
    _, images = build_index(expand_shards(str(folder)))
    print(_summary(images, failures))


def _claim(folder: Path, config: DownloadConfig) -> None:
    """Write down, or compare, what the shards of `folder` are made of."""
    path, urls = folder / "download.json", Path(config.urls)
    if not urls.is_file():
        raise ConfigError(f"urls: {urls}: no such file")
    with urls.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    made_of = {key: getattr(config, key) for key in ("url", "caption", "rows_per_shard", "short_side", "quality")}
    made_of = {"urls_sha256": digest, **made_of}
    if path.exists():
        before = json.loads(path.read_text())
        if other := [key for key, value in made_of.items() if before.get(key) != value]:
            raise ConfigError(f"out: {folder} was begun with another {', '.join(other)}: choose another folder")
    elif any(folder.glob("*.tar")):
        raise ConfigError(f"out: {folder} holds tars that did not come from kd-accel download: choose another folder")
    else:
        _write(path, json.dumps(made_of, indent=1).encode() + b"\n")


def _whole_shards(folder: Path) -> list[Record]:
    """The failures of shards that are done; those of others leave failures.jsonl, as they are tried again."""
    path = folder / "failures.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    failures = [record for record in map(json.loads, lines) if (folder / f"{record['shard']}.tar").exists()]
    _write(path, _lines(failures))
    return failures


async def _download(config: DownloadConfig, folder: Path, failures: list[Record]) -> None:
    """Every shard that is not there; adds to `failures`."""
    rows = read_urls(Path(config.urls), url=config.url, caption=config.caption)
    with tqdm(desc="download", unit="image", disable=None) as bar:
        async with Web(config) as web:
            for shard, work in _shards(rows, config.rows_per_shard):
                if (folder / f"{shard}.tar").exists():
                    bar.update(len(work))
                    continue
                staged = folder / f".{shard}"
                staged.mkdir(exist_ok=True)
                failed = await _fetch_all(work, staged, web, config, bar)
                found = sorted(({"shard": shard, **record} for record in failed), key=lambda record: record["key"])
                failures += found
                _write(folder / "failures.jsonl", _lines(failures))
                _pack(staged, folder / f"{shard}.tar")


def _shards(rows: Iterator[Row], rows_per_shard: int) -> Iterator[tuple[str, Work]]:
    number = 0
    while group := list(islice(rows, rows_per_shard)):
        yield f"{number:05d}", [(f"{number * rows_per_shard + i:09d}", row) for i, row in enumerate(group)]
        number += 1


async def _fetch_all(work: Work, staged: Path, web: Web, config: DownloadConfig, bar: tqdm) -> list[Record]:
    """Put what can be had of a shard into `staged`; the rows that failed."""
    failed: list[Record] = []
    there = {path.stem for path in staged.glob("*.json")}  # written last
    todo = iter(work)

    async def take_rows() -> None:
        for key, (url, caption) in todo:
            if key not in there:
                try:
                    await _fetch_one(staged / key, url, caption, web, config)
                except Failure as failure:
                    failed.append({"key": key, "url": url, "kind": failure.kind, "reason": str(failure)})
                bar.set_postfix(failed=len(failed), refresh=False)
            bar.update()

    async with asyncio.TaskGroup() as group:
        for _ in range(min(config.connections, len(work))):
            group.create_task(take_rows())
    return failed


async def _fetch_one(place: Path, url: str, caption: str | None, web: Web, config: DownloadConfig) -> None:
    """Write the members of one sample; raises Failure."""
    original = await web.fetch(url)
    try:
        image = await asyncio.to_thread(resized, original, config.short_side, config.quality)
    except BadSample as bad:
        raise Failure("no image", bad.reason) from None
    extension, width, height = describe(image)
    _write(place.with_suffix(f".{extension}"), image)
    if caption is not None:
        _write(place.with_suffix(".txt"), caption.encode())
    facts = {"url": url, "sha256": hashlib.sha256(original).hexdigest(), "width": width, "height": height}
    _write(place.with_suffix(".json"), json.dumps(facts).encode())


def _pack(staged: Path, tar: Path) -> None:
    """Make the tar of what is staged, in the order of the list, and remove that."""
    part = tar.with_name(f".{tar.name}.part")
    with tarfile.open(part, "w") as file:
        for path in sorted(path for path in staged.iterdir() if path.suffix != ".part"):
            info = tarfile.TarInfo(path.name)
            info.size = path.stat().st_size
            with path.open("rb") as content:
                file.addfile(info, content)
    os.replace(part, tar)
    shutil.rmtree(staged)


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)


def _lines(records: list[Record]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def _summary(images: int, failures: list[Record]) -> str:
    """One sentence, and how often each kind of failure came."""
    rows = images + len(failures)
    lines = [f"{images:,} images of {rows:,} rows ({images / max(rows, 1):.1%})."]
    kinds = Counter(record["kind"] for record in failures).most_common()
    lines += [f"  {count:>9,}  {kind}" for kind, count in kinds]
    return "\n".join([*lines, "  Each one is in failures.jsonl."] if kinds else lines)
