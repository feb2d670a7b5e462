"""Evaluation sets as folders of class folders, read where they lie: as torchvision's ImageFolder has them.

FOLDER/{test,val}/CLASS/**.jpg   or FOLDER/CLASS/*.jpg; FOLDER/train/CLASS/**.jpg for linear probes
FOLDER/{classnames.txt,label_text.json,zeroshot_classification_templates.txt}    optional, see class_texts.py

A class is a folder, also one without pictures; its index is its place among the sorted names (numbers as numbers).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kd_accel.data.folders import IMAGE_SUFFIXES
from kd_accel.evals.class_texts import CLASS_NAMES, class_names, is_imagenet, read_lines, templates
from kd_accel.evals.prompts import IMAGENET, PROMPTS, SIMPLE
from kd_accel.evals.sets import EvalSet, Sample
from kd_accel.schema import ConfigError

SPLITS = {
    "test": ("test", "val", "valid", "validation", "testlist01"),  # the last is UCF101's, as protoclip reads it
    "train": ("train", "trainlist01"),
}
# Classes of Birdsnap of which the archive has no picture: protoclip leaves them out, so that 491 remain
# (megvii-research/protoclip, training/evaluations/zero_shot.py; ml-jku/cloob issue 10)
BIRDSNAP, BIRDSNAP_EMPTY = 500, (46, 66, 123, 299, 302, 351, 403, 436, 465)


@dataclass(frozen=True)
class ImageFolderSet(EvalSet):
    """A set of which every class is a folder."""

    classes: tuple[Path, ...] = ()  # [C] folders, in the order of the class indices

    def samples(self) -> list[Sample]:
        """Sorted by class, then by path. Raises ConfigError where no class has a picture."""
        samples = [
            Sample(_key(path, folder.parent), path, label=label)
            for label, folder in enumerate(self.classes)
            for path in _images(folder)
        ]
        if not samples:
            raise ConfigError(f"{self.path}: no pictures in its {len(self.classes)} class folders")
        return samples


def open_image_folder(folder: Path, *, name: str | None = None, split: str = "test") -> ImageFolderSet | None:
    """The split of the set in `folder`, or None where it bears no sign of one. Raises ConfigError as class_names does.

    Class folders in `folder` itself are a test split, if two of them hold pictures.
    """
    name = name or folder.resolve().name
    for place in (folder / part for part in SPLITS[split]):
        classes = _subfolders(place)
        if any(next(_images(path), None) for path in classes):
            return _open(folder, place, classes, name)
    with_images = [path for path in _subfolders(folder) if _holds_image(path)]
    # flat folders of whole splits, such as COCO's train2017 and val2017, are no classes
    if split == "test" and len(with_images) > 1 and not all(_is_split(path.name) for path in with_images):
        return _open(folder, folder, _subfolders(folder), name)
    return None


def _open(folder: Path, place: Path, classes: list[Path], name: str) -> ImageFolderSet:
    beside = list(dict.fromkeys([folder, place]))
    folder_names = [path.name for path in classes]
    if name == "birdsnap":
        classes = [path for path in classes if next(_images(path), None)]
        names = _birdsnap_names([path.name for path in classes], beside)
    else:
        names = class_names(folder_names, beside)
    known = IMAGENET if is_imagenet(folder_names) else PROMPTS.get(name, SIMPLE)
    return ImageFolderSet(name, folder, "zero_shot", names, templates(beside, known), tuple(classes))


def _birdsnap_names(classes: list[str], beside: list[Path]) -> tuple[str, ...]:
    """The names of the classes with pictures; a file of all 500 names serves too."""
    for path in (folder / CLASS_NAMES for folder in beside):
        if path.is_file() and len(names := read_lines(path)) == BIRDSNAP:
            kept = tuple(name for i, name in enumerate(names) if i not in BIRDSNAP_EMPTY)
            if len(kept) != len(classes):
                raise ConfigError(
                    f"{path}: names {BIRDSNAP} classes, but {len(classes)} have pictures, not {len(kept)}"
                )
            return kept
    return class_names(classes, beside)


def _subfolders(folder: Path) -> list[Path]:
    """Those that are not hidden, sorted by name; by number where all are numbers."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name[0] != "." and entry.is_dir()]
    numbered = all(name.isdecimal() for name in names)
    return [folder / name for name in sorted(names, key=lambda name: (int(name) if numbered else 0, name))]


def _is_split(name: str) -> bool:
    return re.fullmatch(r"(train|val|test|images)\d*", name) is not None


def _holds_image(folder: Path) -> bool:
    """Directly, not in a folder below."""
    with os.scandir(folder) as entries:
        return any(_is_image(entry.name) for entry in entries)


def _images(folder: Path) -> Iterator[Path]:
    """Every picture in and below `folder`, sorted; links are followed, but not in circles."""
    seen = set()
    for here, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        if (place := os.path.realpath(here)) in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        yield from (Path(here, name) for name in sorted(filter(_is_image, names)))


def _raise(error: OSError) -> None:
    raise ConfigError(f"{error.filename}: cannot be read: {error.strerror}")


def _is_image(name: str) -> bool:
    return name[0] != "." and name.lower().endswith(IMAGE_SUFFIXES)


def _key(path: Path, root: Path) -> str:
    """CLASS/NAME.jpg; names need not be UTF-8."""
    return os.fsencode(path.relative_to(root)).decode("utf-8", "backslashreplace")
