"""kd-accel pack: any source of samples as webdataset shards with their index.

    kd-accel pack table=cc3m/train.tsv out=datasets/cc3m short_side=288

A sample that training could not use is left out and listed in bad_samples.jsonl. A shard is whole or absent, and its
bytes depend on its samples and the settings alone: a rerun writes the shards that are absent, and neither it nor the
number of workers changes a byte. Keys are the samples' ids in the source.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from webdataset import TarWriter

from kd_accel.data.index import build_index
from kd_accel.data.open import open_one
from kd_accel.data.resize import describe, resized
from kd_accel.data.source import BadSample, Sample, Source
from kd_accel.data.workers import as_it_is, is_lost_worker
from kd_accel.pack_config import PackConfig
from kd_accel.schema import ConfigError
from kd_accel.text_files import replace_text
from kd_accel.whole_files import replacing

SETTINGS = "pack.json"  # what the shards of a folder were written with
FREE = ("num_workers",)  # settings that change no byte
NUM_PROBED = 100  # first samples that tell whether captions come in several


def run(config: PackConfig) -> None:
    """Write the shards of `config` that are absent, and say what there is."""
    source = open_one(config, images=config.image is not None, captions=True)
    shards = _Shards(source, config)
    _claim(Path(config.out), config, source.num_samples)
    absent = [number for number, path in enumerate(shards.paths) if not path.exists()]
    started = time.perf_counter()
    packed = sum(_write_all(shards, absent, config.num_workers))
    seconds = time.perf_counter() - started
    bad = _list_bad(shards.paths, Path(config.out) / "bad_samples.jsonl")
    _, samples = build_index(shards.paths, progress=True)
    before = len(shards.paths) - len(absent)
    print(f"{samples:,} samples in {len(shards.paths):,} shards: {len(absent):,} written now, {before:,} already were.")
    if absent:
        print(f"{packed:,} samples in {seconds:,.0f} s: {packed / seconds:,.0f} per second.")
    if bad:
        print(f"{bad:,} unusable samples are left out: {config.out}/bad_samples.jsonl lists them.")


class _Shards(Dataset):
    """Shards by number: reading one writes it. Instances are what the workers get."""

    def __init__(self, source: Source, config: PackConfig):
        self.source, self.config = source, config
        self.several = _has_several(source)
        first = [*range(0, source.num_samples, config.samples_per_shard), source.num_samples]
        self.ranges = [range(*ends) for ends in pairwise(first)]
        digits = max(5, len(str(len(self.ranges) - 1)))
        self.paths = [Path(config.out) / f"{number:0{digits}d}.tar" for number in range(len(self.ranges))]

    def __len__(self) -> int:
        return len(self.ranges)

    def __getitem__(self, number: int) -> int | ConfigError:
        """Samples written; an error is returned, since torch would bury its one line in the worker's traceback."""
        path, bad = self.paths[number], []
        try:
            with replacing(path) as temporary, temporary.open("wb") as file:
                self._write(number, file, bad)
        except OSError as error:
            return ConfigError(f"{path}: {error}: run again after that is mended; the whole shards stay")
        return len(self.ranges[number]) - len(bad)

    def _write(self, number: int, file: BinaryIO, bad: list[dict[str, Any]]) -> None:
        with TarWriter(file, encoder=False, mtime=0, user="root", group="root") as tar:
            for sample_id in self.ranges[number]:
                try:
                    members = self._members(self.source.read(sample_id))
                except BadSample as error:
                    place = {"id": sample_id, "key": self.source.key(sample_id), "shard": self.source.shard(sample_id)}
                    bad.append(place | {"reason": error.reason})
                    continue
                tar.write({"__key__": f"{sample_id:09d}", **members})
        if bad:  # before the shard has its name: one that is whole has its list
            replace_text(_bad_path(self.paths[number]), "".join(json.dumps(record) + "\n" for record in bad))

    def _members(self, sample: Sample) -> dict[str, bytes]:
        """{extension: content}; raises BadSample for a picture or a text that cannot be stored."""
        members = {}
        if sample.image is not None:
            data = resized(sample.image, self.config.short_side, self.config.quality)
            members[describe(data)[0]] = data
        try:
            if sample.captions:
                members["txt"] = sample.captions[0].encode()
            if self.several or _says_several(sample):
                texts = {"captions": sample.captions, "synthetic": sample.synthetic}
                members["json"] = json.dumps(texts, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadSample("caption is not UTF-8") from None
        if sample.label is not None:
            members["cls"] = str(sample.label).encode()
        return members


def _has_several(source: Source) -> bool:
    """Whether samples say more than one caption; then each has a .json, so that data.caption can name its keys."""
    for sample_id in range(min(NUM_PROBED, source.num_samples)):
        try:
            if _says_several(source.read(sample_id)):
                return True
        except BadSample:
            continue
    return False


def _says_several(sample: Sample) -> bool:
    return len(sample.captions) > 1 or len(sample.synthetic) > 0


def _claim(out: Path, config: PackConfig, num_samples: int) -> None:
    """Make the folder ours; raises ConfigError for one that holds other shards, or was begun with other settings."""
    settings = {"num_samples": num_samples} | config.model_dump(mode="json", exclude=set(FREE))
    path = out / SETTINGS
    try:
        out.mkdir(parents=True, exist_ok=True)
        before = json.loads(path.read_bytes()) if path.exists() else None
        if before is None and any(out.glob("*.tar")):
            raise ConfigError(f"out={out}: holds shards that pack did not write there: choose another folder")
        for left in out.glob(".*.tmp"):  # by a run that was killed
            left.unlink(missing_ok=True)
        if before is None:
            replace_text(path, json.dumps(settings, indent=1))
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written: {error.strerror}") from None
    for name, value in settings.items():
        if before is not None and before.get(name) != value:
            then, now = json.dumps(before.get(name)), json.dumps(value)
            raise ConfigError(f"out={out}: was begun with {name}={then}, not {now}: give the same, or another folder")


def _write_all(shards: _Shards, numbers: list[int], num_workers: int) -> Iterator[int]:
    """Samples of each shard, as the shards become ready."""
    workers = min(num_workers, len(numbers))
    ready = DataLoader(
        shards, sampler=numbers, batch_size=None, num_workers=workers, collate_fn=as_it_is, in_order=False
    )
    bar = tqdm(total=sum(len(shards.ranges[number]) for number in numbers), desc="pack", unit="sample", disable=None)
    with bar:
        try:
            for samples in ready:
                if isinstance(samples, ConfigError):
                    raise samples
                bar.update(samples)
                yield samples
        except RuntimeError as error:
            if not is_lost_worker(error):
                raise
            raise ConfigError(
                "num_workers: a worker's process was ended from outside, perhaps for want of memory: run again, perhaps"
                " with fewer; the whole shards stay"
            ) from None


def _list_bad(paths: list[Path], to: Path) -> int:
    """Join the shards' lists; returns how many samples they hold. Without any there is no file."""
    lists = [_bad_path(path) for path in paths if _bad_path(path).exists()]
    lines = [line for path in lists for line in path.read_text(encoding="utf-8").splitlines(keepends=True)]
    if lines:
        replace_text(to, "".join(lines))
    return len(lines)


def _bad_path(shard: Path) -> Path:
    return shard.with_name(f".{shard.stem}.bad.jsonl")
