"""How images and captions lie in the space they share, as ProtoCLIP measures it on COCO.

n images, m captions, d embedding width. Memory grows with CHUNK_ROWS x n, never with n x n; all ranks share the work.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_accel.evals.features import in_chunks

CHUNK_ROWS = 1024  # rows whose similarities to all others exist at a time


def feature_statistics(images: Tensor, texts: Tensor, owner: Tensor) -> dict[str, float | None]:
    """Of unit images [n, d] and, for each of them, the first of its captions; alike on every rank.

    texts [m, d]; caption j describes image owner[j], and each image has one. Rows of any length are made unit rows.

    modality_gap                the distance of the mean image from the mean caption (arXiv:2203.02053, section 4.2)
    positive_pair_similarity    the mean cosine of an image and its caption
    image_avg_self_similarity   the mean of those cosines of two images, also of an image with itself, that are above 0:
    text_avg_self_similarity    ProtoCLIP's reading of figure 2(a) there, which has the mean of all cosines
    image_feature_std           the mean over the d dimensions of the standard deviation over the rows
    text_feature_std            (with n - 1; None for one row)
    """
    images = F.normalize(images.float(), dim=1)
    texts = F.normalize(texts.float()[_first_captions(owner, len(images))], dim=1)
    return {
        "modality_gap": (_mean(images) - _mean(texts)).norm().item(),
        "positive_pair_similarity": (images * texts).sum(dim=1).double().mean().item(),
        "image_avg_self_similarity": _self_similarity(images),
        "text_avg_self_similarity": _self_similarity(texts),
        "image_feature_std": _deviation(images),
        "text_feature_std": _deviation(texts),
    }


def _first_captions(owner: Tensor, num_images: int) -> Tensor:
    """[n] int64: the number of the first caption of each image."""
    captions = torch.arange(len(owner), device=owner.device)
    return captions.new_full((num_images,), len(owner)).scatter_reduce(0, owner, captions, "amin")


def _mean(features: Tensor) -> Tensor:  # [d] fp64
    return features.mean(dim=0, dtype=torch.float64)


def _deviation(features: Tensor) -> float | None:
    return features.double().std(dim=0).mean().item() if len(features) > 1 else None


def _self_similarity(features: Tensor) -> float | None:
    def sums(rows: range) -> Tensor:
        """[rows, 2] fp64: the sum of each row's positive cosines, and how many there are."""
        cosines = features[rows.start : rows.stop] @ features.T
        positive = cosines.clamp(min=0).sum(dim=1, dtype=torch.float64)
        return torch.stack([positive, (cosines > 0).sum(dim=1).double()], dim=1)

    total, count = in_chunks(len(features), sums, chunk_rows=CHUNK_ROWS).sum(dim=0).tolist()
    return total / count if count else None  # rows that are all 0
