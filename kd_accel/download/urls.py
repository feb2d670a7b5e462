"""Lists of image URLs: tsv, csv, or one URL per line."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from kd_accel.schema import ConfigError

Row = tuple[str, str | None]  # URL, caption


def read_urls(path: Path, *, url: str, caption: str) -> Iterator[Row]:
    """(URL, caption or None) of every row that is not empty, in order; `url` and `caption` are headers.

    Raises ConfigError for a file that cannot be read, and one in which no column holds URLs.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            yield from _rows(path, file, url, caption)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def _rows(path: Path, file: TextIO, url: str, caption: str) -> Iterator[Row]:
    rows = filter(any, _cells(path, file))
    first = next(rows, None)
    if first is None:
        raise ConfigError(f"{path}: holds no row")
    if url in first:
        at, caption_at = first.index(url), first.index(caption) if caption in first else None
    else:
        at, caption_at = _columns(path, first)
        yield _row(first, at, caption_at)
    for row in rows:
        yield _row(row, at, caption_at)


def _cells(path: Path, file: TextIO) -> Iterator[list[str]]:
    match path.suffix:
        case ".tsv":  # as CC3M and CC12M: quotes are part of the caption
            return csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        case ".csv":
            return csv.reader(file)
    return ([line.strip()] for line in file)


def _columns(path: Path, first: list[str]) -> tuple[int, int | None]:
    """(column of the URL, column of the caption) of a file without header; of two columns the other is the caption."""
    urls = [column for column, cell in enumerate(first) if cell.startswith(("http://", "https://"))]
    if len(urls) != 1 or len(first) > 2:
        raise ConfigError(
            f"{path}: the columns of a file without header must be one URL, or a URL and a caption; this one "
            f"starts with {first[:4]}: add a header and name its columns in url and caption"
        )
    return urls[0], 1 - urls[0] if len(first) == 2 else None


def _row(cells: list[str], at: int, caption_at: int | None) -> Row:
    url = cells[at].strip() if at < len(cells) else ""
    caption = cells[caption_at].strip() if caption_at is not None and caption_at < len(cells) else ""
    return url, caption or None
