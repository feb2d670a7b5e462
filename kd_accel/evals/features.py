"""Whole evaluation sets through an encoder, on all ranks: the same features on any number of them, to the last bit.

n readable images, m texts, d embedding width. Work is dealt in whole batches and chunks, not in rows: a batch then
holds the same rows on any number of ranks, and a matrix product rounds a row alike in equal batches only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kd_accel import distributed
from kd_accel.data.source import BadSample
from kd_accel.data.transforms import eval_view
from kd_accel.data.workers import items_of
from kd_accel.evals.bars import bar
from kd_accel.evals.encoder import Encoder
from kd_accel.evals.ensemble import Ensemble
from kd_accel.evals.sets import EvalSet, Sample, SetError
from kd_accel.schema import ConfigError
from kd_accel.types import ImageInput

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SetFeatures:
    """What an encoder says of the images of a set; alike on every rank."""

    rows: Tensor  # [n] int64 on the CPU: which samples were readable, ascending
    images: Tensor  # [n, d] raw fp32


def deal(num_rows: int, batch_size: int) -> list[list[range]]:
    """The batches of each rank: [world_size] lists of ranges over 0..num_rows."""
    batches = [range(start, min(start + batch_size, num_rows)) for start in range(0, num_rows, batch_size)]
    world_size = distributed.world_size()
    return [batches[rank::world_size] for rank in range(world_size)]


def in_chunks(num_rows: int, reduce: Callable[[range], Tensor], *, chunk_rows: int) -> Tensor:
    """`reduce` (a range of rows -> one result per row) over all rows, on every rank; each rank does its share.

    num_rows is 1 at least.
    """
    dealt = deal(num_rows, chunk_rows)
    parts = [reduce(rows) for rows in dealt[distributed.rank()]] or [reduce(range(0))]
    everyone = distributed.gather_uneven_rows(torch.cat(parts))
    order = torch.tensor([row for rank in dealt for rows in rank for row in rows], device=everyone.device)
    return everyone[order.argsort()]


def text_features(encoder: Encoder | Ensemble, texts: list[str], *, batch_size: int) -> Tensor:  # [m, d] raw fp32
    """Of all texts on every rank. Raises ConfigError, on every rank, for unknown texts and features not finite."""
    encoder.check_texts(texts)
    encode = lambda rows: encoder.encode_texts([texts[row] for row in rows])  # noqa: E731
    features = in_chunks(len(texts), encode, chunk_rows=batch_size)
    _require_finite(encoder, int((~features.isfinite()).any(1).sum()), f"{len(texts)} text features")
    return features


def image_features(
    encoder: Encoder | Ensemble, eval_set: EvalSet, samples: list[Sample], *, batch_size: int, num_workers: int
) -> SetFeatures:
    """Of every readable image, on every rank; a warning names the others.

    Raises SetError when no image is readable, and ConfigError when a feature is not finite, on every rank.
    """
    load = {"batch_size": batch_size, "num_workers": num_workers}
    parts = [_image_features(member, eval_set, samples, **load) for member in encoder.members]
    if any(not part.rows.equal(parts[0].rows) for part in parts):
        raise SetError(f"{eval_set.path}: some images could be read for one model and not for another: is it changing?")
    return SetFeatures(parts[0].rows, torch.cat([part.images for part in parts], dim=1))


def _image_features(
    encoder: Encoder, eval_set: EvalSet, samples: list[Sample], *, batch_size: int, num_workers: int
) -> SetFeatures:
    rows, bad = [], []
    parts = [encoder.encode_images(torch.empty(0, 3, *encoder.image_input.size, dtype=torch.uint8))]
    for batch_rows, views, batch_bad in _load(encoder, eval_set, samples, batch_size, num_workers):
        rows += batch_rows.tolist()
        parts.append(encoder.encode_images(views))
        bad += batch_bad
    mine = torch.cat(parts)
    # from here on every rank takes part in every step, also one without a single row
    told = distributed.gather_objects((bad, int((~mine.isfinite()).any(1).sum())))
    if any(distributed.any_rank([not eval_set.path.exists()])):  # its last images would be missing in the numbers
        raise SetError(f"{eval_set.path}: went away while it was evaluated")
    _report_bad(eval_set, [line for theirs, _ in told for line in theirs], len(samples))
    _require_finite(encoder, sum(count for _, count in told), f"{len(samples)} image features of {eval_set.name}")
    all_rows = distributed.gather_uneven_rows(torch.tensor(rows, dtype=torch.int64, device=encoder.device))
    order = all_rows.argsort()
    return SetFeatures(all_rows[order].cpu(), distributed.gather_uneven_rows(mine)[order])


class ImageBatches(Dataset):
    """Batches of decoded images: (rows [b] int64, views [b, 3, H, W] uint8, a line for each unreadable image)."""

    def __init__(self, eval_set: EvalSet, samples: list[Sample], batches: list[range], wanted: ImageInput):
        self.eval_set, self.samples, self.batches, self.wanted = eval_set, samples, batches, wanted

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, list[str]]:
        rows, bad = [], []
        views = [torch.empty(0, 3, *self.wanted.size, dtype=torch.uint8)]
        for row in self.batches[number]:
            try:
                views.append(eval_view(self.eval_set.image(self.samples[row]), self.wanted)[None])
                rows.append(row)
            except BadSample as error:
                bad.append(f"{self.samples[row].key}: {error}")
        return torch.tensor(rows, dtype=torch.int64), torch.cat(views), bad


def _load(encoder: Encoder, eval_set: EvalSet, samples: list[Sample], batch_size: int, num_workers: int) -> Any:
    """This rank's batches of ImageBatches, behind a progress bar where a person watches."""
    batches = deal(len(samples), batch_size)[distributed.rank()]
    dataset = ImageBatches(eval_set, samples, batches, encoder.image_input)
    items = items_of(dataset, num_workers=min(num_workers, len(batches)))
    return bar(items, total=len(batches), desc=eval_set.name, unit="batch")


def _report_bad(eval_set: EvalSet, bad: list[str], num_samples: int) -> None:
    if len(bad) == num_samples:
        raise SetError(f"{eval_set.path}: none of its {num_samples} images is readable; the first: {bad[0]}")
    if bad and distributed.is_main():
        shown = "\n".join(f"  {line}" for line in bad[:10]) + ("\n  ..." if len(bad) > 10 else "")
        log.warning("%s: left out %d unreadable of %d images:\n%s", eval_set.path, len(bad), num_samples, shown)


def _require_finite(encoder: Encoder | Ensemble, count: int, what: str) -> None:
    if count:
        raise ConfigError(
            f"{encoder.title}: {count} of {what} are not finite: the weights of this checkpoint are broken "
            "(a run that diverged?); evaluate an earlier checkpoint, or try precision=fp32"
        )
