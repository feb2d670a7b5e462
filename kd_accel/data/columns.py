"""Which columns of a table hold image, captions and label, and that they are there and of the right type.

A column is named as in the table; COLUMN:KEY is the key of a nested value, for instance "json:captions".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from kd_accel.schema import ConfigError, did_you_mean

AUTO = "auto"  # the column as the format of the table calls it

Columns = str | Sequence[str] | None  # one column, several, or none


@dataclass(frozen=True)
class Fields:
    """The columns that are read; None or () where a source has no such thing."""

    image: str | None  # paths, or {bytes, path} as `datasets` stores images
    captions: tuple[str, ...]  # text, or lists of texts
    synthetic: tuple[str, ...]
    label: str | None  # whole numbers
    name: str | None  # paths of images, by which rows are known even where nobody wants to see the images

    @classmethod
    def of(
        cls,
        image: str | None,
        caption: Columns,
        synthetic: Columns,
        label: str | None,
        *,
        defaults: tuple,
        images: bool = True,
    ) -> Fields:
        """Of what the config says, where `defaults` are the format's own (image, caption) in place of AUTO.

        `images`: false for rows that are read without them.
        """
        image = defaults[0] if image == AUTO else image
        caption = defaults[1] if caption == AUTO else caption
        return cls(image if images else None, _listed(caption), _listed(synthetic), label, name=image)

    def keys(self) -> dict[str, str]:
        """{column: the key of the config that names it}, of those that must be there."""
        single = {self.image: "data.image", self.label: "data.label"}
        named = {column: key for column, key in single.items() if column is not None}
        named |= dict.fromkeys(self.captions, "data.caption")
        return named | dict.fromkeys(self.synthetic, "data.synthetic")

    def keys_in(self, columns: Iterable[str]) -> dict[str, str]:
        """`keys`, and the one of the rows' names where it is among `columns`."""
        if self.name is None or {self.name, self.name.split(":")[0]}.isdisjoint(columns):
            return self.keys()
        return {self.name: "data.image"} | self.keys()


def pick(table: pa.Table, fields: Fields, path: str | Path) -> pa.Table:
    """The wanted columns of `table`, read from `path`; raises ConfigError for one that is absent or of another type."""
    picked = {}
    for name, key in fields.keys_in(table.column_names).items():
        head, *inside = [name] if name in table.column_names else name.split(":")
        require_column(head, key, table.column_names, path)
        column = table.column(head)
        if inside:
            column = _inside(column, inside, key, name, path)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        _require_type(column.type, key, name, path)
        picked[name] = column
    return pa.table(picked)


def top_columns(fields: Fields, columns: Iterable[str], path: str | Path) -> list[str]:
    """Those of the `columns` of `path` that must be read; raises ConfigError for a wanted one that is not there."""
    columns = list(columns)
    asked = fields.keys_in(columns)
    heads = {name if name in columns else name.split(":")[0]: key for name, key in asked.items()}
    for name, key in heads.items():
        require_column(name, key, columns, path)
    return list(heads)


def require_column(name: str, key: str, columns: Iterable[str], path: str | Path) -> None:
    """Raises ConfigError, with what there is and the nearest of it, unless `name` is one of the `columns` of `path`."""
    columns = list(columns)
    if name in columns:
        return
    without = " or null, if there is none" if key in ("data.image", "data.caption") else ""
    near = hint if "did you mean" in (hint := did_you_mean(name, columns)) else ""
    listed = ", ".join(columns[:20]) or "its columns, of which there are none"
    raise ConfigError(f"{key}: {path} has no column '{name}'{near}; set {key} to one of {listed}{without}")


def _inside(column: pa.ChunkedArray, names: list[str], key: str, whole: str, path: str | Path) -> pa.ChunkedArray:
    kind = column.type
    for name in names:
        known = [field.name for field in kind.fields] if pa.types.is_struct(kind) else []
        if name not in known:
            hint = did_you_mean(name, known) or "; its values have no keys"
            raise ConfigError(f"{key}: {path} has no '{whole}'{hint}")
        kind = kind.field(name).type
    return pc.struct_field(column, names)


def _require_type(kind: pa.DataType, key: str, name: str, path: str | Path) -> None:
    inner = kind.value_type if key in ("data.caption", "data.synthetic") and _is_list(kind) else kind
    text = pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_string_view(inner)
    if key == "data.label":
        fits, wanted = text or pa.types.is_integer(inner), "whole numbers"
    elif key == "data.image":
        fits, wanted = text or is_embedded(inner), "paths or images"
    else:
        fits, wanted = text, "text or lists of text"
    if not fits:
        raise ConfigError(f"{key}: the column '{name}' of {path} holds {kind}, expected {wanted}")


def is_embedded(kind: pa.DataType) -> bool:
    """Whether values of this type are encoded images, or the {bytes, path} in which `datasets` keeps them."""
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _listed(columns: Columns) -> tuple[str, ...]:
    return () if columns is None else (columns,) if isinstance(columns, str) else tuple(columns)
