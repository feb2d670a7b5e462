"""Captions in one json file, as tables with the columns image and caption.

    COCO   {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}: a row per image, with all of its
           captions, whether or not those are read; with data.image: null a row per caption
    ALBEF  [{"image": PATH, "caption": TEXT or [TEXT, ...]}, ...]: a row per object, whose other keys are columns too

The file is parsed as a whole: 600,000 captions of COCO take some seconds, and the gigabyte that they fill meanwhile is
given back.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from kd_accel.data.columns import Fields, top_columns
from kd_accel.schema import ConfigError


def read_annotations(path: Path, fields: Fields) -> pa.Table:
    """The wanted columns of `path`; raises ConfigError where it is neither of the two layouts."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        hint = "; an object per line is .jsonl" if "Extra data" in str(error) else ""
        raise ConfigError(f"data.table: {path} is not valid JSON: {error}{hint}") from None
    try:
        if isinstance(content, dict):
            return _coco(content, captions_apart=fields.name is None)
        return _albef(content, fields, path)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f'data.table: {path} is neither {{"images": [...], "annotations": [...]}} (COCO) nor a list of objects'
            f" (ALBEF): {type(error).__name__}: {error}"
        ) from None


def coco_images(path: Path) -> Path | None:
    """COCO's own place for the images of annotations/captions_NAME.json: the folder NAME beside annotations/."""
    name = path.stem.removeprefix("captions_")
    folder = path.absolute().parent.parent / name
    return folder if name != path.stem and folder.is_dir() else None


def _coco(content: dict, *, captions_apart: bool) -> pa.Table:
    if captions_apart:
        return pa.table({"caption": [annotation["caption"] for annotation in content["annotations"]]})
    captions: dict[Any, list[str]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    names = [image["file_name"] for image in content["images"]]
    listed = [captions[image["id"]] for image in content["images"]]
    return pa.table({"image": pa.array(names, pa.string()), "caption": pa.array(listed, pa.list_(pa.string()))})


def _albef(rows: list[dict], fields: Fields, path: Path) -> pa.Table:
    wanted = top_columns(fields, dict.fromkeys(key for row in rows[:1000] for key in row), path)
    texts = {*fields.captions, *fields.synthetic}
    columns = {name: [row.get(name) for row in rows] for name in wanted}
    return pa.table({name: _several(values) if name in texts else values for name, values in columns.items()})


def _several(values: list) -> list:
    """One text as a list of one, so that a column may hold both."""
    return [[value] if isinstance(value, str) else value for value in values]
