"""Datasets of the library `datasets`: saved directories, parquet files with images inside, names on the Hub.

    source = open_dataset("saved/flickr", image="image", caption="captions")

They are memory-mapped, and images stay encoded until the loader decodes them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from pyarrow import parquet

from kd_accel.data.columns import AUTO, Columns, Fields, pick, top_columns
from kd_accel.data.rows import Part, RowSource
from kd_accel.schema import ConfigError, did_you_mean


def open_dataset(
    name: str,
    *,
    split: str = "train",
    image: str | None = AUTO,
    caption: Columns = AUTO,
    synthetic: Columns = None,
    label: str | None = None,
    max_samples: int | None = None,
) -> RowSource:
    """A directory written by save_to_disk, a folder of files that load_dataset reads, or a name on the Hub.

    AUTO is `image` and `caption`. Raises ConfigError, with what the library says, for what it cannot load.
    """
    fields = Fields.of(image, caption, synthetic, label, defaults=("image", "caption"))
    dataset = _load(name, split)
    part = Part(name, Path(name) if Path(name).is_dir() else Path(), len(dataset))
    return _source(dataset, fields, [part], key="data.dataset", max_samples=max_samples)


def open_parquet(files: list[Path], fields: Fields, *, max_samples: int | None) -> RowSource:
    """Parquet files with images inside, copied once into the cache of `datasets`, where any row is read at once."""
    dataset = _ask("data.table", files[0], lambda: datasets.Dataset.from_parquet([str(file) for file in files]))
    parts = [Part(str(file), Path(), parquet.read_metadata(file).num_rows) for file in files]
    return _source(dataset, fields, parts, key="data.table", max_samples=max_samples)


class _Rows:
    """The columns of a dataset, also those inside others."""

    def __init__(self, dataset: datasets.Dataset, names: list[str]):
        self._dataset, self._names = dataset, names

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        values = self._dataset[row]
        return {name: _inside(values, name) for name in self._names}


def _inside(values: dict[str, Any], name: str) -> Any:
    for key in [name] if name in values else name.split(":"):
        values = None if values is None else values[key]
    return values


def _source(
    dataset: datasets.Dataset, fields: Fields, parts: list[Part], *, key: str, max_samples: int | None
) -> RowSource:
    name = parts[0].file
    wanted = top_columns(fields, dataset.column_names, name)
    dataset = dataset.select_columns(wanted).with_format(None)
    for column in wanted:
        if isinstance(dataset.features[column], datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    pick(pa.Table.from_batches([], dataset.features.arrow_schema), fields, name)  # checks the types
    label = dataset.features.get(fields.label)
    names = tuple(label.names) if isinstance(label, datasets.ClassLabel) else None
    rows = _Rows(dataset, list(fields.keys()))
    return RowSource(rows, fields, parts, key=key, max_samples=max_samples, class_names=names)


def _load(name: str, split: str) -> datasets.Dataset:
    folder = Path(name)
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        loaded = _ask("data.dataset", name, lambda: datasets.load_from_disk(name))
    else:
        loaded = _ask("data.dataset", name, lambda: datasets.load_dataset(name, split=split))
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if split not in loaded:
        raise ConfigError(f"data.split: {name} has no split '{split}'{did_you_mean(split, list(loaded))}")
    return loaded[split]


def _ask(key: str, name: str | Path, load: Callable[[], Any]) -> Any:
    """What `load` returns, its complaints as one line; bars only where somebody watches."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return load()
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        said = " ".join(str(error.__cause__ or error).split())
        raise ConfigError(f"{key}: {name}: {said}") from None
