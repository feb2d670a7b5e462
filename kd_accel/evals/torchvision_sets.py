"""Evaluation sets as torchvision leaves them on disk, read through torchvision; nothing is downloaded or written.

ROOT/cifar-10-batches-py/   ROOT/gtsrb/GTSRB/   ROOT/food-101/meta/   and so on: see SETS
ROOT/HOME/{classnames.txt,zeroshot_classification_templates.txt}    optional, in place of the names and prompts known

Country211 and GTSRB need classnames.txt: torchvision does not know what their classes are called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision import datasets

from kd_accel.data.source import BadSample
from kd_accel.evals.class_texts import CLASS_NAMES, OPENAI_LISTS, read_lines, templates
from kd_accel.evals.prompts import PROMPTS, SIMPLE
from kd_accel.evals.sets import EvalSet, Sample
from kd_accel.schema import ConfigError

DIGITS = tuple("0123456789")
EUROSAT = (  # OpenAI's names for torchvision's folders AnnualCrop to SeaLake
    *("annual crop land", "forest", "brushland or shrubland", "highway or road"),
    *("industrial buildings or commercial buildings", "pasture land", "permanent crop land"),
    *("residential buildings or homes or apartments", "river", "lake or sea"),
)
BY_SPLIT = {"test": {"split": "test"}, "train": {"split": "train"}}
BY_TRAINVAL = {"test": {"split": "test"}, "train": {"split": "trainval"}}
BY_FLAG = {"test": {"train": False}, "train": {"train": True}}


@dataclass(frozen=True)
class _Layout:
    """What to know of a set of torchvision, beside its class."""

    kind: type
    task: str  # whose prompts it takes
    home: str  # its folder in torchvision's root; "" for files in the root itself
    sign: str  # a file or folder in it, by which it is known
    splits: dict[str, dict[str, Any]]  # ours -> the arguments of `kind`
    labels: str  # attribute of the dataset: [n] class indices, or [n] pairs (file, class index)
    files: str | None = None  # attribute: [n] paths, or such pairs; None: the dataset decodes its pictures itself
    names: tuple[str, ...] | None = None  # instead of the dataset's; () where it has none


SETS = (
    _Layout(datasets.CIFAR10, "cifar10", "cifar-10-batches-py", "test_batch", BY_FLAG, "targets"),
    _Layout(datasets.CIFAR100, "vtab/cifar100", "cifar-100-python", "test", BY_FLAG, "targets"),
    _Layout(datasets.STL10, "stl10", "stl10_binary", "test_X.bin", BY_SPLIT, "labels"),
    _Layout(datasets.MNIST, "mnist", "MNIST", "raw", BY_FLAG, "targets", names=DIGITS),
    _Layout(datasets.FashionMNIST, "fashion_mnist", "FashionMNIST", "raw", BY_FLAG, "targets"),
    _Layout(datasets.SVHN, "vtab/svhn", "", "test_32x32.mat", BY_SPLIT, "labels", names=DIGITS),
    _Layout(datasets.GTSRB, "gtsrb", "gtsrb", "GTSRB", BY_SPLIT, "_samples", names=()),  # .ppm, which we do not decode
    _Layout(datasets.Country211, "country211", "country211", "test", BY_SPLIT, "samples", "samples", names=()),
    _Layout(datasets.Flowers102, "vtab/flowers", "flowers-102", "setid.mat", BY_SPLIT, "_labels", "_image_files"),
    _Layout(
        datasets.FGVCAircraft, "fgvc_aircraft", "fgvc-aircraft-2013b", "data", BY_TRAINVAL, "_labels", "_image_files"
    ),
    _Layout(datasets.Food101, "food101", "food-101", "meta", BY_SPLIT, "_labels", "_image_files"),
    _Layout(datasets.DTD, "vtab/dtd", "dtd", "dtd", BY_SPLIT, "_labels", "_image_files"),
    _Layout(datasets.OxfordIIITPet, "vtab/pets", "oxford-iiit-pet", "annotations", BY_TRAINVAL, "_labels", "_images"),
    _Layout(datasets.RenderedSST2, "renderedsst2", "rendered-sst2", "test", BY_SPLIT, "_samples", "_samples"),
    _Layout(datasets.StanfordCars, "cars", "stanford_cars", "devkit", BY_SPLIT, "_samples", "_samples"),
    # without a split: all of it is the test
    _Layout(datasets.EuroSAT, "vtab/eurosat", "eurosat", "2750", {"test": {}}, "samples", "samples", EUROSAT),
)


@dataclass(frozen=True)
class TorchvisionSet(EvalSet):
    """A set that torchvision reads."""

    layout: _Layout | None = None
    root: Path | None = None  # torchvision's: the folder above the set's home
    split: str = "test"

    def samples(self) -> list[Sample]:
        """In torchvision's order. Raises ConfigError for a label that has no class name, and for an empty set."""
        labels = _second(getattr(self._dataset, self.layout.labels))
        files = [None] * len(labels)
        if self.layout.files is not None:
            files = [Path(file) for file in _first(getattr(self._dataset, self.layout.files))]
        if not len(labels):
            raise ConfigError(f"{self.path}: no pictures")
        if not 0 <= min(labels) <= max(labels) < len(self.class_names):
            raise ConfigError(f"{self.path}: classes {min(labels)} to {max(labels)}, named are {len(self.class_names)}")
        named = f"{self.layout.kind.__name__}/{self.split}"
        return [Sample(f"{named}/{i}", file, label=y) for i, (file, y) in enumerate(zip(files, labels, strict=True))]

    def image(self, sample: Sample) -> Image.Image:
        """As the base class; pictures without a file of their own are torchvision's to decode."""
        if sample.file is not None:
            return super().image(sample)
        try:
            return self._dataset[int(sample.key.rpartition("/")[2])][0].convert("RGB")
        except Exception as error:  # broken bytes raise OSError, SyntaxError, ValueError, struct.error and others
            raise BadSample(f"image cannot be decoded: {type(error).__name__}: {error}") from error

    @cached_property
    def _dataset(self) -> Any:
        return _load(self.layout, self.root, self.split)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_dataset"}


def open_torchvision(folder: Path, *, name: str | None = None, split: str = "test") -> TorchvisionSet | None:
    """The set whose home `folder` is, or that lies alone in `folder`; None where it bears no sign of one, or the set
    has no such split.

    Raises ConfigError for a damaged set, and for one whose class names nobody knows.
    """
    found = [(layout, root) for layout in SETS if (root := _root(layout, folder)) is not None]
    if len(found) != 1 or split not in found[0][0].splits:
        return None
    layout, root = found[0]
    names = _class_names(layout, root, split)
    prompts = templates([root / layout.home], PROMPTS.get(layout.task, SIMPLE))
    return TorchvisionSet(name or folder.resolve().name, folder, "zero_shot", names, prompts, layout, root, split)


def _root(layout: _Layout, folder: Path) -> Path | None:
    """torchvision's root, if `folder` is the set's home or holds nothing but it."""
    if folder.name == layout.home and (folder / layout.sign).exists():
        return folder.parent
    if not (folder / layout.home / layout.sign).exists():
        return None
    others = [path for path in folder.iterdir() if path.is_dir() and path.name[0] != "." and path.name != layout.home]
    return None if others else folder


def _class_names(layout: _Layout, root: Path, split: str) -> tuple[str, ...]:
    path = root / layout.home / CLASS_NAMES
    if path.is_file():
        return read_lines(path)
    if layout.names == ():
        raise ConfigError(f"{path}: needed for {layout.kind.__name__}, a class name per line; {OPENAI_LISTS}")
    names = layout.names or _load(layout, root, split).classes
    return tuple(name.replace("_", " ") for name in names)


def _load(layout: _Layout, root: Path, split: str) -> Any:
    try:
        return layout.kind(root, download=False, **layout.splits[split])
    except (OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
        raise ConfigError(f"{root / layout.home}: torchvision cannot read its split {split}: {error}") from None


def _second(rows: Sequence) -> list[int]:
    """The labels of [n] labels or of [n] pairs."""
    return [int(row[1] if isinstance(row, tuple) else row) for row in rows]


def _first(rows: Sequence) -> list[str]:
    return [row[0] if isinstance(row, tuple) else row for row in rows]
