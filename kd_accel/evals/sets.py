"""An evaluation set, however it lies on disk: its samples without their pixels, and the pixels of one of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from kd_accel.data.source import BadSample
from kd_accel.data.transforms import decode
from kd_accel.schema import ConfigError


class SetError(ConfigError):
    """A set that cannot be evaluated, or not with this model: the other sets can."""


@dataclass(frozen=True)
class Sample:
    """One image of a set: where it lies, and what is true of it."""

    key: str
    file: Path | None = None  # that holds the encoded image; None: the set reads it in its own way
    offset: int = 0  # bytes from the file's start
    size: int | None = None  # bytes; None: the whole file
    label: int | None = None  # zero_shot: class index
    captions: tuple[str, ...] = ()  # retrieval: at least one
    meta: tuple[int, ...] = ()  # zero_shot: the columns of KEY.npy, by which DataComp groups some sets


@dataclass(frozen=True)
class EvalSet(ABC):
    """One evaluation set; a subclass per layout. Travels to loader workers, so it holds no open file."""

    name: str  # the task's key ("vtab/cifar100"), or the folder's name
    path: Path  # for messages
    kind: str  # zero_shot | retrieval | winogavil
    class_names: tuple[str, ...] = ()  # zero_shot: [C], in the order of the class indices
    templates: tuple[str, ...] = ()  # zero_shot: prompts with the placeholder {c}

    @abstractmethod
    def samples(self) -> list[Sample]:
        """Every row, alike on every rank, so that a mistake in it stops all ranks at once; raises ConfigError."""

    def image(self, sample: Sample) -> Image.Image:
        """The image in RGB. Raises BadSample where it cannot be read."""
        try:
            with sample.file.open("rb") as file:
                file.seek(sample.offset)
                data = file.read(-1 if sample.size is None else sample.size)
        except OSError as error:
            raise BadSample(f"cannot be read: {error}") from None
        return decode(data)
