"""Datasets of HuggingFace on disk, as rows: parquet, save_to_disk, and the .arrow files of a cache.

`datasets` no longer runs the scripts that some repositories consist of; their rows are still to be had as parquet
(the branch refs/convert/parquet of the repository) or from the cache of an earlier version.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from kd_accel.schema import ConfigError, did_you_mean

FETCH = "hf download NAME --repo-type dataset --revision refs/convert/parquet --local-dir FOLDER"


def open_rows(source: str, split: str) -> datasets.Dataset:
    """The split of the dataset in `source`, images still encoded.

    Raises ConfigError for a folder without one, with several, without that split, or that cannot be read.
    """
    path = Path(source)
    if not path.exists():
        raise ConfigError(f"source={source}: no such file or folder; a repository on the Hub is fetched by: {FETCH}")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return _read(path, split).with_format("arrow")  # which leaves images encoded
    except ConfigError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        said = " ".join(str(error.__cause__ or error).split())
        raise ConfigError(f"source={source}: cannot be read: {said}") from None


def require_column(rows: datasets.Dataset, key: str, name: str) -> None:
    """Raises ConfigError, which begins with `key`, where the rows have no column `name`."""
    if name not in rows.column_names:
        raise ConfigError(f"{key}: the source has no column '{name}'{did_you_mean(name, rows.column_names)}")


def column(rows: datasets.Dataset, name: str) -> list[Any]:
    """All values of a column."""
    return rows.select_columns([name])[:][name].to_pylist()


def value(rows: datasets.Dataset, row: int, name: str) -> Any:
    """One of them."""
    return rows[row][name][0].as_py()


def image_bytes(value: dict[str, Any] | None, what: str) -> bytes:
    """An encoded image as `datasets` stores it, in the row or as the path of a file; raises ConfigError for neither."""
    if not isinstance(value, dict) or not (value.get("bytes") or value.get("path")):
        raise ConfigError(f"{what}: holds no image")
    if value.get("bytes"):
        return value["bytes"]
    try:
        return Path(value["path"]).read_bytes()
    except OSError as error:
        raise ConfigError(f"{what}: its file {value['path']} cannot be read: {error.strerror}") from None


def _read(path: Path, split: str) -> datasets.Dataset:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.Dataset):
            return saved
        if split not in saved:
            raise ConfigError(f"split={split}: {path} has no such split{did_you_mean(split, list(saved))}")
        return saved[split]
    if files := _of_split(_files(path, ".parquet"), split):
        return datasets.Dataset.from_parquet([str(file) for file in files])
    if files := _of_split(_files(path, ".arrow"), split):
        return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
    raise ConfigError(f"source={path}: holds no dataset of HuggingFace: looked for state.json, *.parquet and *.arrow")


def _files(path: Path, suffix: str) -> list[Path]:
    """Sorted; hidden folders hold what is only half fetched."""
    if path.is_file():
        return [path] if path.suffix == suffix else []
    found = (file.relative_to(path) for file in path.rglob(f"*{suffix}"))
    return [path / file for file in sorted(found) if not any(part[0] == "." for part in file.parts)]


def _of_split(files: Sequence[Path], split: str) -> list[Path]:
    """The files of one dataset's split: a single file, or those called NAME-SPLIT-00000-of-00002 or SPLIT/0000."""
    if len(files) < 2:
        return list(files)
    of_split = [file for file in files if _is_of(file, split)]
    if not of_split:
        raise ConfigError(f"split={split}: none of the files says that it is this split; the first is {files[0]}")
    if len(folders := {file.parent for file in of_split}) > 1:
        raise ConfigError(f"source: several datasets, name one of the folders {', '.join(sorted(map(str, folders)))}")
    return of_split


def _is_of(file: Path, split: str) -> bool:
    name = re.sub(r"-\d+-of-\d+$", "", file.stem)
    return file.parent.name == split or name == split or name.endswith(f"-{split}")
