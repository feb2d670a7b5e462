"""Tables as sources of samples: csv, tsv, jsonl, parquet, json annotations, lines of text.

    source = open_table("cc3m/train.tsv", image="filepath", caption="title")

.tsv and .csv  with a header; a .csv whose header has a tab is tab-separated, as open_clip's are. In a tab-separated
               file a row is a line and quotes are text, in a comma-separated one quotes may enclose commas and lines.
               Where all columns are named by numbers ("0"), the file has no header: Conceptual Captions.
.jsonl         an object per line; its types are those of the first lines
.parquet       images may lie inside, as {bytes, path}; those are read through `datasets`
.json          annotations.py
.txt           a caption per line, empty lines left out

A value is never taken for null: the caption "NA" is two letters. Bytes that are not UTF-8 cost their row.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv, parquet
from pyarrow import json as arrow_json

from kd_accel.data.annotations import coco_images, read_annotations
from kd_accel.data.braces import expand_braces
from kd_accel.data.columns import AUTO, Columns, Fields, is_embedded, pick, top_columns
from kd_accel.data.rows import ArrowRows, Part, RowSource
from kd_accel.schema import ConfigError, did_you_mean

NUM_TYPED = 1000  # first lines of a .jsonl, which decide the types of its values
BLOCK_BYTES = 1 << 24  # of a .jsonl or .csv that is parsed at a time; no line may be longer


def open_table(
    paths: str | list[str],
    *,
    image: str | None = AUTO,
    caption: Columns = AUTO,
    synthetic: Columns = None,
    label: str | None = None,
    image_root: str | None = None,
    max_samples: int | None = None,
    images: bool = True,
) -> RowSource:
    """The rows of one or several files of one format; the arguments name columns, None: the samples have no such thing.

    `images`: false leaves them unread, and they need not be there; rows and their names are the same either way.
    Relative image paths start from `image_root`; None: from the folder of the file that has them. Brace ranges in
    `paths` are expanded. Raises ConfigError for files that are missing or cannot be parsed and for absent columns.
    """
    files = expand_files(paths)
    suffix = _format(files)
    read, *defaults = FORMATS[suffix]
    fields = Fields.of(image, caption, synthetic, label, defaults=tuple(defaults), images=images)
    if not fields.keys() and fields.name is None:
        raise ConfigError("data.image, data.caption: both are null, so there is nothing to read")
    if suffix == ".parquet" and _ask(files[0], _holds_images, fields):
        if fields.image is not None:
            from kd_accel.data.huggingface import open_parquet  # `datasets` takes long to import

            return open_parquet(files, fields, max_samples=max_samples)
        fields = replace(fields, name=None)
    tables = [pick(_ask(file, read, fields), fields, file) for file in files]
    parts = [Part(str(file), _folder(file, image_root), len(t)) for file, t in zip(files, tables, strict=True)]
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ConfigError(f"data.table: the files have columns of different types: {error}") from None
    return RowSource(ArrowRows(table), fields, parts, key="data.table", max_samples=max_samples)


def expand_files(paths: str | list[str]) -> list[Path]:
    """The files that `paths` names, brace ranges expanded. Raises ConfigError for a missing one, or one given twice."""
    files = [Path(name) for name in expand_braces(paths, "data.table")]
    if missing := [file for file in files if not file.is_file()]:
        hint = "; a folder of images is data.folder" if missing[0].is_dir() else ""
        raise ConfigError(f"data.table: {missing[0]}: no such file{hint}")
    if len(files) != len({file.resolve() for file in files}):
        raise ConfigError("data.table: a file is given twice")
    return files


def _format(files: list[Path]) -> str:
    suffixes = sorted({file.suffix.lower() for file in files})
    if len(suffixes) != 1:
        raise ConfigError(f"data.table: files of one table have one format, not {' and '.join(suffixes) or 'none'}")
    if suffixes[0] not in FORMATS:
        hint = did_you_mean(suffixes[0], list(FORMATS))
        raise ConfigError(f"data.table: {files[0]}: unknown extension '{suffixes[0]}'{hint}")
    return suffixes[0]


def _ask(file: Path, read: Callable[[Path, Fields], Any], fields: Fields) -> Any:
    """What `read` returns; what its libraries raise as one line."""
    try:
        return read(file, fields)
    except ConfigError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ConfigError(f"data.table: {file} cannot be read: {str(error).splitlines()[0]}") from None


def _folder(file: Path, image_root: str | None) -> Path:
    return Path(image_root) if image_root is not None else coco_images(file) or file.parent


def _read_separated(file: Path, fields: Fields) -> pa.Table:
    with file.open("rb") as stream:
        header = stream.readline()
    tabs = file.suffix.lower() == ".tsv" or b"\t" in header
    asked = fields.keys()
    numbered = bool(asked) and all(name.isdecimal() for name in asked)
    quotes = {"quote_char": False} if tabs else {"newlines_in_values": True}
    parsing = csv.ParseOptions(delimiter="\t" if tabs else ",", **quotes)
    found = _names(header, parsing)
    names = [str(i) for i in range(len(found))] if numbered else None
    wanted = top_columns(fields, names or found, file)
    return csv.read_csv(
        file,
        read_options=csv.ReadOptions(block_size=BLOCK_BYTES, column_names=names),
        parse_options=parsing,
        convert_options=csv.ConvertOptions(
            include_columns=wanted,
            column_types=dict.fromkeys(wanted, pa.string()),
            check_utf8=False,  # one bad byte must not cost the file
            strings_can_be_null=False,
        ),
    )


def _names(header: bytes, parsing: csv.ParseOptions) -> list[str]:
    return list(csv.read_csv(pa.BufferReader(header), parse_options=parsing).column_names)


def _read_jsonl(file: Path, fields: Fields) -> pa.Table:
    """Only the wanted keys, typed by the first lines: others may hold whatever they like."""
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        first = [json.loads(line) for line in islice((line for line in lines if line.strip()), NUM_TYPED)]
    if not all(isinstance(row, dict) for row in first):
        raise ConfigError(f"data.table: {file} holds lines that are no objects; a list of objects is .json")
    wanted = top_columns(fields, dict.fromkeys(key for row in first for key in row), file)
    schema = pa.Table.from_pylist([{name: row.get(name) for name in wanted} for row in first]).schema
    return arrow_json.read_json(
        file,
        read_options=arrow_json.ReadOptions(block_size=BLOCK_BYTES),
        parse_options=arrow_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
    )


def _read_parquet(file: Path, fields: Fields) -> pa.Table:
    names = parquet.read_schema(file).names
    return parquet.read_table(file, columns=top_columns(fields, names, file))


def _holds_images(file: Path, fields: Fields) -> bool:
    schema = parquet.read_schema(file)
    return fields.name in schema.names and is_embedded(schema.field(fields.name).type)


def _read_lines(file: Path, fields: Fields) -> pa.Table:
    """The file's own bytes, cut after each line end, which is stripped like every white space around a caption."""
    data = np.fromfile(file, np.uint8)
    data = data[3:] if data[:3].tobytes() == codecs.BOM_UTF8 else data
    cuts = np.unique(np.concatenate([[0], np.flatnonzero(data == ord("\n")) + 1, [len(data)]])).astype(np.int64)
    lines = pa.LargeStringArray.from_buffers(len(cuts) - 1, pa.py_buffer(cuts), pa.py_buffer(data))
    return pa.table({"text": lines.filter(pc.not_equal(pc.ascii_trim_whitespace(lines), ""))})


FORMATS: dict[str, tuple] = {  # extension -> reader, and what AUTO stands for as image and as caption
    ".csv": (_read_separated, "filepath", "title"),
    ".tsv": (_read_separated, "filepath", "title"),
    ".jsonl": (_read_jsonl, "filepath", "title"),
    ".parquet": (_read_parquet, "filepath", "title"),
    ".json": (read_annotations, "image", "caption"),
    ".txt": (_read_lines, None, "text"),
}
