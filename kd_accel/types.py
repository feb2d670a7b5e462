"""The records that travel between files: what a model wants to see, a batch, and its features.

Letters used in all of kd_accel: b rows of this rank, B rows of all ranks, d embedding width, T tokens, N sample ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class ImageInput:
    """How one model wants its pixels."""

    size: tuple[int, int]  # height, width
    mean: tuple[float, float, float]  # of pixels in 0..1
    std: tuple[float, float, float]
    interpolation: str  # bicubic | bilinear
    resize_mode: str  # shortest | longest | squash, as in open_clip


@dataclass(frozen=True)
class TextInput:
    """How one model wants its captions."""

    context_length: int  # tokens
    tokenizer: str  # name of the tokenizer: models that share a name and a context length share their tokens
    tokenize: Callable[[list[str]], Tensor]  # captions -> [b, T] int64
    pad: int | None  # columns of nothing but this token at the end may be cut off: features stay; None: never cut


@dataclass(frozen=True)
class InputContract:
    """What one model wants to see; read from the model's own configuration, never guessed."""

    image: ImageInput | None  # None: it has no image tower
    text: TextInput | None  # None: it has no text tower

    def only(self, towers: set[str]) -> InputContract:
        """What of it the given towers ("image", "text") need."""
        return InputContract(self.image if "image" in towers else None, self.text if "text" in towers else None)


@dataclass(frozen=True)
class Batch:
    """What one rank sees in one step."""

    ids: Tensor  # [b] int64, the sample's row in the dataset, 0 <= id < N
    image: Tensor | None  # [b, 3, H, W] uint8, one decoded view; every model resizes and normalises it on the device
    text: dict[str, Tensor]  # model name ("student", a teacher's) -> [b, T] int64 tokens
    labels: Tensor | None = None  # [b] int64, class numbers, where the data has some
    stored: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # teacher -> its features read from disk, [b, d]

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; host-to-device copies are asynchronous where the memory is pinned."""

        def move(part: Any) -> Any:
            if isinstance(part, dict):
                return {name: move(value) for name, value in part.items()}
            return None if part is None else part.to(device, non_blocking=True)

        return Batch(*(move(getattr(self, f.name)) for f in fields(self)))


@dataclass(frozen=True)
class Features:
    """What one model says of a batch: unit rows, of this rank or a chunk of it, and the columns of all ranks."""

    image: Tensor  # [b, d]
    text: Tensor  # [b, d]
    all_image: Tensor  # [B, d], every rank's rows in rank order
    all_text: Tensor  # [B, d]


@dataclass(frozen=True)
class TeacherSpec:
    """What the objective has to know of a teacher."""

    embed_dim: int  # d of its features
    logit_scale: float  # 1 / temperature of its logits
    weight: float = 1.0  # factor of its terms, and its share in an ensemble
    towers: tuple[str, ...] = ("image", "text")  # those it has
