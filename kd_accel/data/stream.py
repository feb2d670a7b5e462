"""Samples of tars as they come, without an index: webdataset streaming of files, URLs and, where allowed, pipes.

What is given up for it: no ids (a sample's id is a hash of its name), so nothing can be remembered of a sample; the
order holds for one number of processes and workers only, and a resumed run goes on at the next shard.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
import webdataset as wds
from webdataset.gopen import gopen
from webdataset.tariterators import group_by_keys, tar_file_expander

from kd_accel.data.braces import expand_braces
from kd_accel.data.members import IMAGE_EXTENSIONS, Field, class_number, texts_of
from kd_accel.data.source import BadSample, Sample
from kd_accel.data.urls import is_remote, shown
from kd_accel.schema import ConfigError, LocalError

log = logging.getLogger("kd_accel")

PIPE = "pipe:"


@dataclass(frozen=True)
class Unusable:
    """A sample that cannot be used, or (without key) the rest of a shard."""

    shard: str
    key: str | None
    reason: str


def expand_streams(shards: str | list[str], *, allow_pipe: bool) -> list[str]:
    """The files, URLs and pipes that `shards` names, brace ranges expanded.

    Raises ConfigError for a file that is missing, and for a pipe unless `allow_pipe`: it is a command that is run.
    """
    urls = expand_braces(shards, "data.shards")
    for url in urls:
        if url.startswith(PIPE) and not allow_pipe:
            raise ConfigError(f"data.shards: {url} is a command: set data.allow_pipe=true to run it")
        if not url.startswith(PIPE) and not is_remote(url) and not Path(url).is_file():
            raise ConfigError(f"data.shards: {url}: no such file")
    if not urls:
        raise ConfigError("data.shards: names no shard")
    return urls


class TarStream:
    """Endless samples of the tars at `urls`; the fields are those of TarSource. `seed` decides the order.

    `buffer`: samples that are mixed with each other.
    """

    def __init__(
        self,
        urls: list[str],
        *,
        seed: int,
        buffer: int,
        image: bool = True,
        captions: Sequence[str] = (),
        synthetic: Sequence[str] = (),
        label: str | None = None,
    ):
        self.urls, self._seed, self._buffer = urls, seed, buffer
        self._image, self._label = image, label
        self._captions, self._synthetic = [Field.parse(c) for c in captions], [Field.parse(c) for c in synthetic]
        fields = {field.extension for field in (*self._captions, *self._synthetic)} | ({label} if label else set())
        self._wanted = tuple(f".{extension}" for extension in fields | (set(IMAGE_EXTENSIONS) if image else set()))

    def samples(self, part: int, parts: int, shards_done: int) -> Iterator[tuple[int, Sample | Unusable]]:
        """(pass over the data, sample) of every `parts`-th shard from `part` on, the first `shards_done` left out.

        Never ends. Raises LocalError when a whole pass has no sample in it.
        """
        rng = random.Random(f"{self._seed} {part} {parts} {shards_done}")
        in_order = self._in_order(part, parts, shards_done)
        return iter(wds.shuffle(self._buffer, initial=self._buffer, rng=rng)(in_order))

    def _in_order(self, part: int, parts: int, shards_done: int) -> Iterator[tuple[int, Sample | Unusable]]:
        mine = len(range(part, len(self.urls), parts))
        epoch, skip = divmod(shards_done, mine)
        while True:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self.urls))
            usable, last = 0, None
            for shard in order[part::parts][skip:]:
                for found in self._shard(self.urls[shard]):
                    if isinstance(found, Sample):
                        usable += 1
                    else:
                        last = found
                    yield epoch, found
            if not usable:
                where = f"{last.shard}: {last.reason}" if last else "they are empty"
                raise LocalError(f"data.shards: {mine} shards without a usable sample, {where}")
            epoch, skip = epoch + 1, 0

    def _shard(self, url: str) -> Iterator[Sample | Unusable]:
        try:
            with _opened(url) as stream:
                files = tar_file_expander([{"url": url, "stream": stream}], select_files=self._is_wanted)
                for members in group_by_keys(files):
                    yield self._sample(members, url)
        except Exception as error:  # of tarfile, of every library under fsspec, of a command that failed
            reason = f"the rest of the shard is lost: {type(error).__name__}: {error.args[0] if error.args else ''}"
            log.warning("%s: %s", shown(url), reason)
            yield Unusable(shown(url), None, reason)

    def _is_wanted(self, name: str) -> bool:
        return name.lower().endswith(self._wanted)

    def _sample(self, members: dict[str, Any], url: str) -> Sample | Unusable:
        key = members["__key__"]
        try:
            image = _first(members, IMAGE_EXTENSIONS, "image") if self._image else None
            captions = _texts(members, self._captions, "caption")
            synthetic = _texts(members, self._synthetic, "synthetic caption")
            label = None
            if self._label is not None:
                label = class_number(_first(members, (self._label,), "label").decode("ascii", "replace"))
        except BadSample as bad:
            return Unusable(shown(url), key, bad.reason)
        return Sample(_id_of(url, key), key, image, captions, label, synthetic)


@contextmanager
def _opened(url: str) -> Iterator[BinaryIO]:
    # webdataset would hand URLs to curl by way of a shell
    with closing(gopen(url)) if url.startswith(PIPE) else fsspec.open(url, "rb") as stream:
        yield stream


def _id_of(url: str, key: str) -> int:
    """A number below 2^63 that goes with shard and key: augmentation and captions are drawn from it."""
    return int.from_bytes(hashlib.blake2b(f"{shown(url)}\0{key}".encode(), digest_size=8).digest()) >> 1


def _first(members: dict[str, bytes], extensions: tuple[str, ...], name: str) -> bytes:
    for extension in extensions:
        if extension in members:
            return members[extension]
    raise BadSample(f"{name} member is missing")


def _texts(members: dict[str, bytes], fields: list[Field], name: str) -> tuple[str, ...]:
    has = [(field, members[field.extension]) for field in fields if field.extension in members]
    return texts_of(has, name) if fields else ()
