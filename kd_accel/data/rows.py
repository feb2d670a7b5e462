"""Rows of tables as samples by id, and what their values may be.

Every kind of table (tables.py, annotations.py, folders.py, huggingface.py) comes down to a RowSource over its rows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from kd_accel.data.columns import Fields
from kd_accel.data.members import class_number
from kd_accel.data.source import BadSample, Sample, Source
from kd_accel.schema import ConfigError

BLOCK = 10_000  # rows that count as one shard
NUM_PROBED = 100  # first rows whose images are looked for before anything starts


@dataclass(frozen=True)
class Part:
    """The rows of one file."""

    file: str
    folder: Path  # what relative image paths start from
    num_rows: int


class Rows(Protocol):
    """What `datasets.Dataset` is too: {column: value} by row number; picklable."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> dict[str, Any]: ...


class ArrowRows:
    """The columns of `table`. Strings stay in Arrow's buffers, which forked workers share without ever copying a page.

    Python's own strings would be copied page by page, since reading one writes its reference count.
    """

    def __init__(self, table: pa.Table):
        self._columns = {name: table.column(name) for name in table.column_names}
        self._num_rows = len(table)

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: column[row].as_py() for name, column in self._columns.items()}

    def text(self, column: str | None, row: int) -> str | None:
        """A value as it can be shown, whatever its bytes are; None where it is null, or there is no such column."""
        values = None if column is None else self._columns.get(column)
        data = None if values is None else values[row].as_buffer()
        return None if data is None else data.to_pybytes().decode("utf-8", "backslashreplace")


class RowSource(Source):
    """Samples (source.py) of `rows`, which come from `parts`; the first `max_samples` of them where that is given.

    Raises ConfigError for a table without rows, and when not one of its first images is there. `key` says what names
    the table in the config, for messages.
    """

    def __init__(
        self,
        rows: Rows,
        fields: Fields,
        parts: Sequence[Part],
        *,
        key: str,
        max_samples: int | None = None,
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        self.rows, self.fields, self.parts, self.class_names = rows, fields, tuple(parts), class_names
        self.num_samples = min(len(rows), max_samples or len(rows))
        self.shard_sizes = np.diff([*range(0, self.num_samples, BLOCK), self.num_samples]).astype(np.int64)
        self._starts = np.cumsum([0, *(part.num_rows for part in parts)])
        if not self.num_samples:
            raise ConfigError(f"{key}: {parts[0].file} holds no samples")
        self._probe(key)

    def read(self, sample_id: int) -> Sample:
        """The sample; raises BadSample for a value that is absent or not what it should be."""
        try:
            row = self.rows[sample_id]
        except UnicodeDecodeError:
            raise BadSample("row is not UTF-8") from None
        fields = self.fields
        captions, synthetic = (_texts(row, columns) for columns in (fields.captions, fields.synthetic))
        if fields.captions and not captions:
            raise BadSample("caption is empty")
        label = None if fields.label is None else class_number(_text(row[fields.label]))
        image = None if fields.image is None else _image(row[fields.image], self._part(sample_id)[0].folder)
        return Sample(sample_id, self.key(sample_id), image, captions, label, synthetic)

    def key(self, sample_id: int) -> str:
        """The path of the image as the row has it, read or not; without one, the number of the row in its file."""
        path = self.rows.text(self.fields.name, sample_id) if isinstance(self.rows, ArrowRows) else None
        return path or str(self._part(sample_id)[1])

    def shard(self, sample_id: int) -> str:
        """The file that holds the row."""
        return self._part(sample_id)[0].file

    def _part(self, sample_id: int) -> tuple[Part, int]:
        """The part that holds the row, and the row's number in it."""
        number = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        return self.parts[number], sample_id - int(self._starts[number])

    def _probe(self, key: str) -> None:
        """A wrong folder shows here, and not as thousands of bad samples."""
        if self.fields.image is None or not isinstance(self.rows, ArrowRows):
            return
        rows = range(min(self.num_samples, NUM_PROBED))
        paths = [self._part(row)[0].folder / (self.rows.text(self.fields.image, row) or "") for row in rows]
        if not any(map(os.path.isfile, paths)):
            raise ConfigError(
                f"{key}: none of the first {len(paths)} images of {self.parts[0].file} exists, the first is {paths[0]}:"
                " data.image names the column of paths, data.image_root the folder that relative ones start from"
            )


def _texts(row: dict[str, Any], columns: tuple[str, ...]) -> tuple[str, ...]:
    values = [value for column in columns for value in _values(row[column])]
    return tuple(text for value in values if value is not None and (text := value.strip()))


def _values(value: str | list[str] | None) -> list[str | None]:
    return [*value] if isinstance(value, list) else [value]


def _text(value: int | str | None) -> str:
    return "" if value is None else str(value)


def _image(value: str | bytes | dict | None, folder: Path) -> bytes:
    if isinstance(value, dict):
        value = value["bytes"] or value.get("path")
    if isinstance(value, bytes):
        return value
    if not value:
        raise BadSample("image is missing")
    path = os.path.join(folder, value)
    if not os.path.isfile(path):  # nor a device or a pipe, from which one would read for ever
        raise BadSample(f"image cannot be read: {value[:200]!r} is no file")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadSample(f"image cannot be read: {value[:200]!r}: {error.strerror}") from None
