"""Folders of images as sources of samples.

    FOLDER/*.jpg          images only
    FOLDER/CLASS/**.jpg   labels and captions too: a class is a sub-folder, its number that of its name among the sorted

A caption is the name of the class, or what a json file says of it: {"n01440764": "tench"}, also by the number of the
class, and with several texts as a list.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kd_accel.data.columns import AUTO, Columns, Fields
from kd_accel.data.rows import ArrowRows, Part, RowSource
from kd_accel.schema import ConfigError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


def open_folder(
    folder: str,
    *,
    caption: Columns = AUTO,
    labels: bool = False,
    max_samples: int | None = None,
    images: bool = True,
) -> RowSource:
    """The images of `folder`, sorted by path; `caption`: a json file with texts, None: no captions.

    `images`: false leaves them unread.

    Raises ConfigError for a folder without images, with images both in and beside sub-folders, and for labels or texts
    of classes where there are none.
    """
    root = existing_folder(folder)
    found = _images(root)
    classes = sorted(found.keys() - {""})
    if found.get("") and classes:
        raise ConfigError(f"data.folder: {folder} holds images itself and in {classes[0]}/: give one or the other")
    if wanted := ["data.label"] * labels + ["data.caption"] * (caption not in (None, AUTO)):
        if not classes:
            raise ConfigError(f"{wanted[0]}: {folder} has no sub-folders with images, which would be its classes")
    paths = [os.fsencode(path) for name in sorted(found) for path in sorted(found[name])]
    columns = {"image": pa.array(paths, pa.large_binary()).view(pa.large_string())}  # names need not be UTF-8
    if classes:
        columns["label"] = pa.array(np.repeat(np.arange(len(classes)), [len(found[name]) for name in classes]))
    if texts := _texts(caption, classes):
        columns["caption"] = pa.array(texts, pa.list_(pa.string())).take(columns["label"])
    shown = "image" if images else None
    fields = Fields(shown, ("caption",) if texts else (), (), "label" if labels else None, name="image")
    part = Part(str(folder), root, len(paths))
    names = tuple(classes) if labels else None
    rows = ArrowRows(pa.table(columns))
    return RowSource(rows, fields, [part], key="data.folder", max_samples=max_samples, class_names=names)


def existing_folder(folder: str) -> Path:
    """Raises ConfigError for one that is not there."""
    if not Path(folder).is_dir():
        raise ConfigError(f"data.folder: {folder}: no such folder")
    return Path(folder)


def _images(root: Path) -> dict[str, list[str]]:
    """{first sub-folder, "" for none: paths of its images, relative to `root`}; hidden files are left out."""
    found: dict[str, list[str]] = {}
    for folder, _, names in os.walk(root, followlinks=True):
        inside = os.path.relpath(folder, root)
        prefix = "" if inside == "." else f"{inside}/"
        images = [prefix + name for name in names if name[0] != "." and name.lower().endswith(IMAGE_SUFFIXES)]
        if images:
            found.setdefault(prefix.partition("/")[0], []).extend(images)
    return found


def _texts(caption: Columns, classes: list[str]) -> list[list[str]]:
    """The texts of each class; [] for no captions."""
    if caption is None:
        return []
    if caption == AUTO:
        return [[name] for name in classes]
    if not isinstance(caption, str):
        raise ConfigError(f"data.caption: for a folder it is one json file (got {', '.join(caption)})")
    try:
        texts = json.loads(Path(caption).read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.caption: {caption} cannot be read as JSON: {error}") from None
    numbers = [str(number) for number in range(len(classes))]
    names = numbers if isinstance(texts, dict) and texts.keys() == set(numbers) else classes
    return [_listed(texts, name, caption) for name in names]


def _listed(texts: Any, name: str, path: str) -> list[str]:
    value = texts.get(name) if isinstance(texts, dict) else None
    if not (isinstance(value, str) or isinstance(value, list) and all(isinstance(text, str) for text in value)):
        raise ConfigError(f'data.caption: {path} has no text for the folder {name}; expected {{"{name}": "..."}}')
    return [value] if isinstance(value, str) else value
