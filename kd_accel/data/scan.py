"""The members of a tar from anywhere, in one pass over its headers, without believing what they claim.

A sample is a run of consecutive members that share folder and name up to the first dot, as in webdataset.
"""

from __future__ import annotations

import logging
import os
import re
import tarfile
from pathlib import Path
from typing import BinaryIO, cast

from kd_accel.schema import ConfigError

log = logging.getLogger("kd_accel")

MAX_NAME = 1024  # characters; keys are kept as a table as wide as the longest one
MAX_HEADER = 2**16  # bytes; a long name or what pax adds to a header
_HARMLESS = re.compile(r"[^\x00-\x1f\x7f]+")  # no control characters: names reach logs, and numpy drops NUL at an end
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)  # (key, extension), as webdataset splits a name

Samples = list[tuple[str, dict[str, tuple[int, int]]]]  # (key, {extension: (offset, size)}), bytes


def scan(path: Path) -> Samples:
    """The samples of one tar in one pass over its headers; raises ConfigError for a truncated or damaged tar."""
    samples: Samples = []
    skipped, first_skipped = 0, ""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=cast(BinaryIO, _Headers(file)), mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps them all: 1 KB each
                if not 0 <= member.size <= tar.offset - member.offset_data:
                    raise tarfile.ReadError("a size that is none")
                if not member.isdir() and not _add_member(path, samples, member):
                    skipped, first_skipped = skipped + 1, first_skipped or member.name[:80]
            # tarfile ends quietly at a cut or damaged header; a whole tar ends with a block of zeros
            file.seek(tar.offset)
            whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except ConfigError:
        raise
    except (tarfile.TarError, ValueError, RecursionError):  # the last two: absurd numbers and endless chains of headers
        whole = False
    if not whole:
        count = max(len(samples) - 1, 0)  # the last one may lack members
        raise ConfigError(f"{path}: not a whole tar, it breaks off after {count} whole samples: fetch or pack it again")
    if skipped:
        log.warning("%s: %d members are no plain files and are skipped, the first is %a", path, skipped, first_skipped)
    return samples


class _Headers:
    """What tarfile reads of a tar: headers alone, never past the end, and none larger than a header is."""

    def __init__(self, file: BinaryIO):
        self._file, self.tell = file, file.tell
        self._size = os.fstat(file.fileno()).st_size

    def seek(self, position: int) -> None:
        if not 0 <= position <= self._size:
            raise tarfile.ReadError("cut, or a size that is none")
        self._file.seek(position)

    def read(self, size: int) -> bytes:
        data = self._file.read(size) if 0 <= size <= MAX_HEADER else b""
        if len(data) < size:
            raise tarfile.ReadError("cut, or a header that is none")
        return data


def _add_member(path: Path, samples: Samples, member: tarfile.TarInfo) -> bool:
    """Add what belongs to a sample; False for a link, a device and a name that nobody gives to a file."""
    if not member.isreg() or member.issparse() or len(member.name) > MAX_NAME or not _HARMLESS.fullmatch(member.name):
        return False
    if (match := _MEMBER.fullmatch(member.name)) is None:
        return True  # no extension: as webdataset, belongs to no sample
    key, extension = match[1], match[2].lower()
    if not samples or samples[-1][0] != key:
        samples.append((key, {}))
    members = samples[-1][1]
    if extension in members:
        raise ConfigError(f"{path}: {member.name} is there twice in one sample")
    members[extension] = (member.offset_data, member.size)
    return True
