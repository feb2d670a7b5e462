"""Class names and prompts of sets whose layout holds only pictures: from files beside them, or known of ImageNet.

classnames.txt                           a name per line, in the order of the class indices (CLIP_benchmark's)
label_text.json                          {"0": "tench, Tinca tinca", ...}, by class index or by the class folder's name
zeroshot_classification_templates.txt    a prompt per line, with {c} for the class name (CLIP_benchmark's)
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from open_clip import IMAGENET_CLASSNAMES
from timm.data import ImageNetInfo

from kd_accel.schema import ConfigError

CLASS_NAMES = "classnames.txt"
LABEL_TEXT = "label_text.json"
TEMPLATES = "zeroshot_classification_templates.txt"
OPENAI_LISTS = "OpenAI's lists are in data/prompts.md of github.com/openai/CLIP"


def class_names(classes: Sequence[str], folders: Sequence[Path]) -> tuple[str, ...]:
    """What the class folders `classes` stand for: as the first of `folders` with a file says; else ImageNet's names for
    its synsets (n01440764) and for the numbers 0 to 999; else the folders' names as words, from red_fox and, where all
    are written that way, from ApplyEyeMakeup.

    Raises ConfigError for a file that does not name every class, for synsets outside of ImageNet-1k, and for numbers.
    """
    for folder in folders:
        if (folder / CLASS_NAMES).is_file():
            return _counted(read_lines(folder / CLASS_NAMES), classes, folder / CLASS_NAMES)
        if (folder / LABEL_TEXT).is_file():
            return _label_text(folder / LABEL_TEXT, classes)
    if is_imagenet(classes):
        return _imagenet_names(classes, folders[0])
    if len(classes) > 10 and all(name.isdecimal() for name in classes):  # ten are digits
        raise ConfigError(
            f"{folders[0]}: its class folders are numbers: put {CLASS_NAMES} there, a name per line; {OPENAI_LISTS}"
        )
    if all(re.fullmatch("([A-Z][a-z]*)+", name) for name in classes):
        return tuple(re.sub("(?<=[a-z])(?=[A-Z])", " ", name) for name in classes)
    return tuple(name.replace("_", " ") for name in classes)


def templates(folders: Sequence[Path], default: Sequence[str]) -> tuple[str, ...]:
    """The prompts that the first of `folders` with a file gives, else `default`; raises ConfigError for a bad file."""
    for folder in folders:
        if (path := folder / TEMPLATES).is_file():
            lines = read_lines(path)
            if not lines or any("{c}" not in line for line in lines):
                raise ConfigError(f"{path}: expected a prompt per line, each with the placeholder {{c}}")
            return lines
    return tuple(default)


def is_imagenet(classes: Sequence[str]) -> bool:
    """Whether folders are called as ImageNet's classes are: by synset, or ImageNetV2's 0 to 999."""
    synsets = all(len(name) == 9 and name[0] == "n" and name[1:].isdecimal() for name in classes)
    return synsets or sorted(classes) == sorted(map(str, range(1000)))


def read_lines(path: Path) -> tuple[str, ...]:
    """The lines of a text file, stripped, without empty ones at its end; raises ConfigError for what is no UTF-8."""
    try:
        return tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").strip().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from None


def read_json(path: Path) -> Any:
    """The content of a json file; raises ConfigError for what is none."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from None


def _counted(names: tuple[str, ...], classes: Sequence[str], path: Path) -> tuple[str, ...]:
    if len(names) != len(classes) or not all(names):
        raise ConfigError(f"{path}: expected {len(classes)} class names, one per line, found {sum(map(bool, names))}")
    return names


def _label_text(path: Path, classes: Sequence[str]) -> tuple[str, ...]:
    texts = read_json(path)
    numbers = [str(number) for number in range(len(classes))]
    keys = numbers if isinstance(texts, dict) and texts.keys() == set(numbers) else classes
    for key in keys:
        if not isinstance(texts, dict) or not isinstance(texts.get(key), str):
            raise ConfigError(f'{path}: no name for class {key}; expected {{"0": "...", "1": "...", ...}}')
    return tuple(texts[key] for key in keys)


def _imagenet_names(classes: Sequence[str], folder: Path) -> tuple[str, ...]:
    number = {synset: i for i, synset in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    number |= {str(i): i for i in range(1000)}
    if unknown := [name for name in classes if name not in number]:
        raise ConfigError(
            f"{folder}: {unknown[0]} is no class of ImageNet-1k: put {CLASS_NAMES} there, a name per line"
        )
    return tuple(IMAGENET_CLASSNAMES[number[name]] for name in classes)
