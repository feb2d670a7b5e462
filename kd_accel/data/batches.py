"""Samples to batches: views, drawn captions, each model's tokens, labels, and what is stored of the sample.

`row` and `join` run in the loader's workers, `batch` and `steps_of` in the training process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from kd_accel.data.captions import draw_text
from kd_accel.data.embeddings import EmbeddingStore
from kd_accel.data.source import Sample
from kd_accel.data.views import Views, largest, shared_views
from kd_accel.data_config import DataConfig
from kd_accel.trim import trimmed
from kd_accel.types import Batch, InputContract, TextInput

TokenKind = tuple[str, int, int | None]  # models of one kind share their tokens


@dataclass(frozen=True)
class Row:
    """One sample as the models will see it."""

    id: int
    epoch: int
    view: Tensor | None  # [3, H, W] uint8
    text: str
    text_number: int  # in captions.all_texts
    label: int | None


@dataclass(frozen=True)
class Joined:
    """b rows on their way to the training process."""

    ids: Tensor  # [b]
    image: Tensor | None  # [b, 3, H, W] uint8
    tokens: dict[TokenKind, Tensor]  # [b, T]
    labels: Tensor | None  # [b]
    stored: dict[str, dict[str, Tensor]]  # by teacher and tower, [b, d]


class BatchMaker:
    """What the models of a run want to see of a sample. Raises ConfigError for stores of other views."""

    def __init__(
        self,
        config: DataConfig,
        contracts: dict[str, InputContract],
        *,
        seed: int,
        stores: dict[str, EmbeddingStore] | None = None,
    ):
        self._config, self._seed, self._stores = config, seed, stores or {}
        size = largest(contracts.values())
        wanted = None if size is None else Views(size, config.augment, seed)
        of_images = {name: store.views for name, store in self._stores.items() if store.views is not None}
        self._views = shared_views(wanted, of_images)
        texts = {name: contract.text for name, contract in contracts.items() if contract.text is not None}
        self._kinds = {name: _kind(text) for name, text in texts.items()}
        self._texts = {_kind(text): text for text in texts.values()}
        self.reads_images = self._views is not None
        # stored features of a caption want to know which of the sample's texts it is
        self.reads_captions = bool(texts) or any("text" in store.towers for store in self._stores.values())

    def row(self, sample: Sample, epoch: int) -> Row:
        """The sample in `epoch`; raises BadSample, also for one that was unusable when its features were stored."""
        for store in self._stores.values():
            store.check(sample.id)
        text, number = "", 0
        if self.reads_captions:
            text, number = draw_text(sample, self._config, seed=self._seed, epoch=epoch)
        view = None if sample.image is None or self._views is None else self._views.make(sample, epoch)
        return Row(sample.id, epoch, view, text, number, sample.label)

    def join(self, rows: list[Row]) -> Joined:
        """b rows of one epoch; each kind of tokens is cut to the longest caption among them."""
        texts = [row.text for row in rows]
        view, texts_read = rows[0].epoch, np.array([row.text_number for row in rows])
        views = [row.view for row in rows if row.view is not None]
        ids = np.array([row.id for row in rows])
        return Joined(
            ids=torch.from_numpy(ids),
            image=torch.stack(views) if views else None,
            tokens={kind: trimmed(text.tokenize(texts), text.pad) for kind, text in self._texts.items()},
            labels=None if rows[0].label is None else torch.tensor([row.label for row in rows]),
            stored={name: store.read(ids, view=view, texts=texts_read) for name, store in self._stores.items()},
        )

    def batch(self, joined: Joined) -> Batch:
        """With every model's tokens under its name."""
        tokens = {name: joined.tokens[kind] for name, kind in self._kinds.items()}
        return Batch(joined.ids, joined.image, tokens, joined.labels, joined.stored)


def steps_of(
    items: Iterable[tuple[Joined, list[dict]]], batch: Callable[[Joined], Batch], accumulate: int
) -> Iterator[tuple[list[Batch], list[dict]]]:
    """(micro-batches of a step, records of its bad samples), of what the workers made; `batch` is a BatchMaker's."""
    items = iter(items)
    while step := list(islice(items, accumulate)):
        yield [batch(joined) for joined, _ in step], [record for _, bad in step for record in bad]


def _kind(text: TextInput) -> TokenKind:
    return text.tokenizer, text.context_length, text.pad
