"""Prompts by which images are searched and sorted: where their texts come from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import open_clip

from kd_accel.schema import ConfigError

LABELS = "label_text.json"  # beside a folder's classes: {"0": "tench, Tinca tinca", ...}, by place in sorted order


def prompt_texts(prompts: str) -> list[str]:
    """Of "imagenet", of a file with one per line (empty lines do not count), of a folder's sub-folders.

    Raises ConfigError for what is none of them, and for no prompt at all.
    """
    if prompts == "imagenet":
        found = list(open_clip.IMAGENET_CLASSNAMES)
    elif Path(prompts).is_dir():
        found = _class_names(Path(prompts))
    else:
        found = [line.strip() for line in _read(Path(prompts)).splitlines()]
    if not any(found):
        raise ConfigError(f"prompts: {prompts}: holds no prompt")
    return [prompt for prompt in found if prompt]


def is_stored(prompts: str) -> bool:
    """Whether the key names embeddings, and not words."""
    return prompts.endswith(".safetensors")


def sha256(prompts: str, templates: list[str]) -> str:
    """Of what the prompts say, or of the file that holds their embeddings."""
    if is_stored(prompts):
        return hashlib.sha256(_bytes(Path(prompts))).hexdigest()
    return hashlib.sha256(json.dumps([prompt_texts(prompts), templates]).encode()).hexdigest()


def _class_names(folder: Path) -> list[str]:
    """Sub-folders in sorted order, which is that of labels; as label_text.json calls them, where there is one."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if not (folder / LABELS).is_file():
        return names
    try:
        words = json.loads(_read(folder / LABELS))
        return [words[str(place)] for place in range(len(names))]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"prompts: {folder / LABELS}: expected a name for each of 0..{len(names) - 1}: {error}"
        ) from None


def _read(file: Path) -> str:
    try:
        return _bytes(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompts: {file} is not UTF-8 text: {error}") from None


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"prompts: {file} cannot be read ({error.strerror}), nor is it imagenet") from None
