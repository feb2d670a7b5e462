"""Image-text retrieval: recall@k and mean rank both ways, with one or several captions per image, in bounded memory.

n images, m captions, d embedding width. Scores exist one tile at a time, never as an n x m matrix; all ranks share the
tiles. Every score is exact: unit rows are rounded to whole multiples of 2^-26, and float64 adds the products of two of
them up without rounding, in any order. So no place depends on tiles, ranks or device, and equal rows tie. The rounding
moves a cosine by less than the arithmetic of fp32 would.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_accel import distributed
from kd_accel.evals.bars import bar

KS = (1, 5, 10)
TILE = (1024, 512)  # captions x images whose scores exist at a time: 4 MiB, which processors keep in their caches
UNIT = 2**26  # what 1.0 becomes


def recall(images: Tensor, texts: Tensor, owner: Tensor, *, tile: tuple[int, int] = TILE) -> dict[str, float]:
    """Shares (0..1) of queries with a right answer among the k best, for k = 1, 5, 10, and mean ranks (1 is the best).

    images [n, d] and texts [m, d] of any length, alike on every rank; caption j describes image owner[j]. k may exceed
    the candidates. image_retrieval: an image is sought for each caption; text_retrieval: any of its captions is sought
    for each image. The names are CLIP_benchmark's and DataComp's. Collective.
    """
    image_places, text_places = places(images, texts, owner, tile=tile)
    found = {"image": image_places.double(), "text": text_places.double()}
    metrics = {f"{what}_retrieval_recall@{k}": (found[what] < k).double().mean().item() for what in found for k in KS}
    metrics["mean_recall@1"] = (metrics["text_retrieval_recall@1"] + metrics["image_retrieval_recall@1"]) / 2
    return metrics | {f"{what}_mean_rank": found[what].mean().item() + 1 for what in found}


def places(
    images: Tensor, texts: Tensor, owner: Tensor, *, tile: tuple[int, int] = TILE
) -> tuple[Tensor, Tensor]:  # [m], [n]
    """The place (int64, from 0) of its image for each caption, and of the best placed of its captions for each image.

    A candidate comes before another with a greater score, or with the same score and a lower index: ties have one
    outcome. Every image has a caption. Collective.
    """
    images, texts = fixed_point(images), fixed_point(texts)
    right = torch.cat([_paired(images[o], t) for o, t in zip(owner.split(tile[0]), texts.split(tile[0]), strict=True)])
    best, first = _best_caption(right, owner, len(images))
    number = torch.arange(max(len(texts), len(images)), device=owner.device)
    image_places, text_places = torch.zeros_like(owner), torch.zeros_like(first)
    for these, those in _my_tiles(len(texts), len(images), tile):  # captions, images
        scores = texts[these].double() @ images[those].double().T  # [b, c]
        image_places[these] += _before(scores, number[those], right[these], owner[these])
        text_places[those] += _before(scores.T, number[these], best[those], first[those])
    image_places, text_places = distributed.sum_over_ranks([image_places, text_places])
    return image_places, text_places


def fixed_point(features: Tensor) -> Tensor:  # [n, d] int32
    """Unit rows, in whole numbers of 1 / UNIT."""
    return torch.cat([(F.normalize(part.double(), dim=-1) * UNIT).round().int() for part in features.split(TILE[0])])


def _paired(images: Tensor, texts: Tensor) -> Tensor:
    """[b] float64: the score of each row of `images` with the same row of `texts`."""
    return (images.double() * texts.double()).sum(-1)


def _best_caption(right: Tensor, owner: Tensor, num_images: int) -> tuple[Tensor, Tensor]:
    """The score [n] and the number [n] of each image's best caption, the first one of equals."""
    best = right.new_full((num_images,), float("-inf")).scatter_reduce(0, owner, right, "amax")
    number = torch.arange(len(owner), device=owner.device).where(right == best[owner], len(owner))
    return best, owner.new_full((num_images,), len(owner)).scatter_reduce(0, owner, number, "amin")


def _my_tiles(num_texts: int, num_images: int, tile: tuple[int, int]) -> Iterable[tuple[slice, slice]]:
    """This rank's tiles, captions x images, behind a progress bar where a person watches."""
    rows, columns = (
        [slice(start, min(start + size, count)) for start in range(0, count, size)]
        for count, size in zip((num_texts, num_images), tile, strict=True)
    )
    mine = list(product(rows, columns))[distributed.rank() :: distributed.world_size()]
    return bar(mine, desc="retrieval", unit="tile")


def _before(scores: Tensor, number: Tensor, right: Tensor, right_number: Tensor) -> Tensor:
    """[b] int64: how many of the candidates `number` [c], with `scores` [b, c], come before the right answers.

    Those are the candidates `right_number` [b], with the scores `right` [b].
    """
    right = right[:, None]
    return torch.where(number < right_number[:, None], scores >= right, scores > right).sum(1)
