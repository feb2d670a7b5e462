"""Prompts by which images are searched and sorted: their texts, and what they mean to a teacher.

P prompts, T templates, d embedding width.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kd_accel.models.teacher import Teacher
from kd_accel.schema import ConfigError

AT_A_TIME = 256
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


def prompt_embeddings(texts: list[str], templates: list[str], teacher: Teacher) -> Tensor:  # [P, d]
    """fp32 unit rows on the CPU: of each prompt the mean over the templates' unit embeddings, normalised again."""
    if teacher.contract.text is None:
        raise ConfigError("teacher: has no text tower: embed the prompts elsewhere and give them as .safetensors")
    words = [template.replace("{}", text).replace("{c}", text) for text in texts for template in templates]
    parts = [words[start : start + AT_A_TIME] for start in range(0, len(words), AT_A_TIME)]
    rows = [teacher.encode_captions(part).float().cpu() for part in parts]
    return F.normalize(F.normalize(torch.cat(rows), dim=1).unflatten(0, (len(texts), len(templates))).mean(1), dim=1)


def stored_prompts(file: Path) -> Tensor:  # [P, d]
    """fp32 unit rows of the tensor `embeddings` of a safetensors file; raises ConfigError where there is none."""
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"prompts: {file} cannot be read: {error}") from None
    rows = found.get("embeddings")
    if rows is None or rows.ndim != 2 or not rows.float().norm(dim=1).gt(0).all() or not rows.isfinite().all():
        shapes = {name: list(tensor.shape) for name, tensor in found.items()}
        raise ConfigError(f"prompts: {file} needs `embeddings` [P, d], finite and not zero; it holds {shapes}")
    return F.normalize(rows.float(), dim=1)


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
