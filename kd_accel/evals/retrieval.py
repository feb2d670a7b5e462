"""Image-text retrieval: recall@k both ways, with one or several captions per image, exact, in bounded memory.

n images, m captions, d embedding width. Memory grows with CHUNK_ROWS x max(n, m), never with n x m.
"""

from __future__ import annotations

import torch
from torch import Tensor

KS = (1, 5, 10)
CHUNK_ROWS = 256  # queries whose scores exist at a time


def recall(images: Tensor, texts: Tensor, owner: Tensor, *, chunk_rows: int = CHUNK_ROWS) -> dict[str, float]:
    """Shares (0..1) of queries with a right answer among the k best, for k = 1, 5, 10; k may exceed the candidates.

    images [n, d], texts [m, d] with unit rows; caption j describes image owner[j]. image_retrieval: an image is sought
    for each caption; text_retrieval: any of its captions is sought for each image. The names are CLIP_benchmark's.
    """
    image_index = torch.arange(len(images), device=owner.device)
    ranks = {
        "image": _ranks(texts, images, owner, image_index, chunk_rows),
        "text": _ranks(images, texts, image_index, owner, chunk_rows),
    }
    return {f"{what}_retrieval_recall@{k}": (ranks[what] < k).double().mean().item() for what in ranks for k in KS}


def _ranks(queries: Tensor, candidates: Tensor, query_ids: Tensor, candidate_ids: Tensor, chunk_rows: int) -> Tensor:
    """[queries] int64: how many candidates come before the best one that has the query's id."""
    chunks = zip(queries.split(chunk_rows), query_ids.split(chunk_rows), strict=True)
    return torch.cat([rank_of_match(q @ candidates.T, ids[:, None] == candidate_ids) for q, ids in chunks])


def rank_of_match(scores: Tensor, match: Tensor) -> Tensor:
    """[b] int64: place (from 0) of the best match among the `scores` [b, m]; `match` [b, m] bool, one true at least.

    A candidate comes before it with a greater score, or with the same score and a lower index: ties have one outcome.
    """
    index = torch.arange(scores.shape[1], device=scores.device)
    best = scores.masked_fill(~match, float("-inf")).amax(1, keepdim=True)
    first = index.where(match & (scores == best), scores.shape[1]).amin(1, keepdim=True)
    return ((scores > best) | ((scores == best) & (index < first))).sum(1)
