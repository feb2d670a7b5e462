"""Which folders hold an evaluation set, in any of the layouts that we read; and where the set of a named task lies.

find_sets(["datasets/zeroshot"])                    every set in and below the folders
find_task("vtab/cifar100", [Path("datasets")])      that task's set, or the places where it is not
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kd_accel.evals.captions_json import FILES, open_captions
from kd_accel.evals.image_folder import open_image_folder
from kd_accel.evals.sets import EvalSet
from kd_accel.evals.tars import MARKERS, open_tars
from kd_accel.evals.torchvision_sets import open_torchvision
from kd_accel.evals.winogavil_set import CSV, QUESTIONS, open_winogavil
from kd_accel.schema import ConfigError

# Folders of a task beside DataComp's and CLIP_benchmark's own (see _folder_names): torchvision's, protoclip's, and what
# the archives unpack to
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "cars": ("stanford_cars",),
    "cifar10": ("cifar-10-batches-py",),
    "coco": ("coco2017", "COCO", "coco2014", "mscoco"),
    "fgvc_aircraft": ("fgvc-aircraft-2013b",),
    "food101": ("food-101",),
    "imagenet-a": ("imagenet_a",),
    "imagenet-o": ("imagenet_o",),
    "imagenet-r": ("imagenet_r",),
    "imagenet1k": ("imagenet", "imagenet-1k", "ILSVRC2012"),
    "imagenet_sketch": ("imagenet-sketch", "sketch"),
    "imagenetv2": ("imagenetv2-matched-frequency-format-val",),
    "misc/winogavil": ("winogavil",),
    "mnist": ("MNIST",),
    "objectnet": ("objectnet-1.0",),
    "renderedsst2": ("rendered-sst2",),
    "retrieval/flickr_1k_test_image_text_retrieval": (
        "flickr_1k_test_image_text_retrieval",
        "wds_flickr30k_test",
        "flickr30k",
    ),
    "retrieval/mscoco_2014_5k_test_image_text_retrieval": (
        "mscoco_2014_5k_test_image_text_retrieval",
        "wds_mscoco_captions_test",
        "mscoco_captions",
    ),
    "stl10": ("stl10_binary",),
    "sun397": ("SUN397",),
    "vtab/caltech101": ("101_ObjectCategories",),
    "vtab/cifar100": ("cifar-100-python",),
    "vtab/flowers": ("flowers102", "flowers-102"),
    "vtab/pets": ("oxford-iiit-pet",),
}


def find_sets(folders: str | Path | Sequence[str | Path]) -> list[EvalSet]:
    """The sets that `folders` name, in order; a folder of sets gives all of them, sorted by name.

    A file is one of captions (COCO's or ALBEF's json). Raises ConfigError, saying what was looked for, where a folder
    is of no layout.
    """
    folders = [folders] if isinstance(folders, str | Path) else folders
    found = [eval_set for folder in folders for eval_set in _find(Path(folder))]
    names = Counter(eval_set.name for eval_set in found)
    # a/val and b/val must not become one row of a report
    found = [s if names[s.name] == 1 else replace(s, name=f"{s.path.parent.name}/{s.name}") for s in found]
    if same := [name for name, count in Counter(eval_set.name for eval_set in found).items() if count > 1]:
        places = " and ".join(str(eval_set.path) for eval_set in found if eval_set.name == same[0])
        raise ConfigError(f"data: {places} would both be called {same[0]}: rename a folder, or leave one out")
    return found


def find_task(key: str, roots: Sequence[Path], split: str = "test") -> EvalSet | list[str]:
    """The `split` (test, or train for a linear probe) of the task's set below the first of the `roots` that has it;
    where none does, the folders that were looked for.

    Raises ConfigError for a set that is there and is damaged.
    """
    folders = [root / name for root in roots for name in _folder_names(key)]
    for folder in folders:
        if folder.is_dir() and (found := _open(folder, key, split)):
            return found
    return [str(folder) for folder in folders]


def _folder_names(key: str) -> list[str]:
    """DataComp's wds_vtab-cifar100_test, the same without ends, the last part of the key, and OTHER_NAMES; each once.

    As in DataComp, fairness/ is no part of a folder's name, and wilds/ is.
    """
    name = key.removeprefix("fairness/").replace("/", "-")
    return list(
        dict.fromkeys([f"wds_{name}_test", f"wds_{name}", name, key.rpartition("/")[2], *OTHER_NAMES.get(key, ())])
    )


def _find(path: Path) -> list[EvalSet]:
    if path.is_file() and (found := open_captions(path)):
        return [found]
    if not path.is_dir():
        raise ConfigError(f"data: {path}: no such folder")
    if here := _open(path):
        return [here]
    below = [_open(folder) for folder in sorted(path.iterdir()) if folder.is_dir() and folder.name[0] != "."]
    if not any(below):
        raise ConfigError(
            f"data: {path} holds no evaluation set: looked for {', '.join(MARKERS)} (CLIP_benchmark's layout), for "
            f"*.tar (images with captions), class folders in test/, in val/ or in itself, {', '.join(FILES)}, "
            f"{QUESTIONS} or {CSV} (WinoGAViL), sets of torchvision, and for any of these in its subfolders"
        )
    return [eval_set for eval_set in below if eval_set]


def _open(folder: Path, name: str | None = None, split: str = "test") -> EvalSet | None:
    """The set in `folder`, by the first layout of which it bears a sign; raises ConfigError for a locked folder."""
    try:
        return (
            open_winogavil(folder, name=name, split=split)
            or open_captions(folder, name=name, split=split)
            or open_torchvision(folder, name=name, split=split)
            or open_image_folder(folder, name=name, split=split)
            or _open_tars(folder, name, split)  # last: its sign classnames.txt may lie beside class folders too
        )
    except OSError as error:
        raise ConfigError(f"data: {error.filename or folder}: cannot be read: {error.strerror}") from None


def _open_tars(folder: Path, name: str | None, split: str) -> EvalSet | None:
    """As open_tars; tars without a training split are no training set."""
    if split == "test" or (folder / split / "nshards.txt").is_file():
        return open_tars(folder, name=name, split=split)
    return None
