"""A loader whose batches cost nothing: random pixels, tokens and labels in the shapes of the data's."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kd_accel.data.views import largest
from kd_accel.types import Batch, InputContract

CLASSES = 2


class SyntheticLoader:
    """What a TrainLoader is to the trainer. Attributes as there."""

    class_names = None

    def __init__(
        self,
        contracts: dict[str, InputContract],
        stored: dict[str, dict[str, int]],
        *,
        batch_size: int,
        accumulate: int,
        world_size: int,
    ):
        """`stored`: by teacher, the widths of the features of each tower that would be read."""
        self.batch_size, self.accumulate = batch_size, accumulate
        self.global_batch = batch_size * accumulate * world_size
        self.num_samples, self.steps_per_epoch = self.global_batch, 1
        size = largest(contracts.values())
        texts = {name: contract.text for name, contract in contracts.items() if contract.text is not None}
        self._batch = Batch(
            ids=torch.arange(batch_size),
            image=None if size is None else torch.randint(256, (batch_size, 3, *size), dtype=torch.uint8),
            text={name: _tokens(batch_size, text.context_length) for name, text in texts.items()},
            labels=torch.randint(CLASSES, (batch_size,)),
            stored={
                name: {tower: torch.randn(batch_size, width) for tower, width in widths.items()}
                for name, widths in stored.items()
            },
        )

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            yield [self._batch] * self.accumulate

    def take_bad(self) -> list[dict]:
        return []

    def state_dict(self) -> dict[str, int]:
        return {}


def _tokens(rows: int, length: int) -> Tensor:
    """Captions at full length; the last token is the largest, which is where CLIP's text transformer looks."""
    tokens = torch.randint(1, 1000, (rows, length))
    tokens[:, -1] = 1000
    return tokens
