"""COCO retrieval under the names of three other systems, for tables that are compared with theirs.

- ImageSearchLightningCLIP: val/inbatch_topK, the share of images whose own caption is among the K best of a batch of
  512; one caption per image, the last one (there "val_acc/topK", with the batch size of the run).
- ProtoCLIP: image2text-R@K, text2image-R@K, mean-recall; percent.
- ALBEF and systems after it: txt_rK (texts are sought), img_rK, txt_r_mean, img_r_mean, r_mean; percent.

n images, m captions, d embedding width.
"""

from __future__ import annotations

from statistics import fmean

import torch
from torch import Tensor

KS = (1, 5, 10)
INBATCH_KS = (1, 2, 3, 4, 5, 10, 20, 30, 50)
BATCH = 512  # the last one of a set is smaller, and easier

_PAIRS = {
    "image2text-R@": "text",
    "text2image-R@": "image",
    "txt_r": "text",
    "img_r": "image",
}  # name -> what is sought
PERCENT = frozenset(
    [f"{name}{k}" for name in _PAIRS for k in KS] + ["mean-recall", "txt_r_mean", "img_r_mean", "r_mean"]
)  # the names that are percent, among metrics that are shares


def coco_keys(metrics: dict[str, float], images: Tensor, texts: Tensor, owner: Tensor) -> dict[str, float]:
    """The metrics by the names above; `metrics` has {image,text}_retrieval_recall@{1,5,10} as shares.

    images [n, d] and texts [m, d] have unit rows; caption j describes image owner[j] (int64).
    """
    recall = {(what, k): 100 * metrics[f"{what}_retrieval_recall@{k}"] for what in ("image", "text") for k in KS}
    keys = {f"{name}{k}": recall[what, k] for name, what in _PAIRS.items() for k in KS}
    keys |= {f"{name}_mean": fmean(keys[f"{name}{k}"] for k in KS) for name in ("txt_r", "img_r")}
    both = fmean(recall.values())
    place = _inbatch_place(images, texts[_last_caption(owner, len(images))])
    inbatch = {f"val/inbatch_top{k}": (place < k).double().mean().item() for k in INBATCH_KS}
    return keys | {"r_mean": both, "mean-recall": both} | inbatch


def _last_caption(owner: Tensor, num_images: int) -> Tensor:  # [n] int64
    caption = torch.arange(len(owner), device=owner.device)
    return owner.new_zeros(num_images).scatter_reduce(0, owner, caption, "amax")


def _inbatch_place(images: Tensor, captions: Tensor) -> Tensor:  # [n] int64
    """How many captions of its batch come before an image's own: greater scores, and equal ones that stand earlier."""
    places = []
    for image, caption in zip(images.split(BATCH), captions.split(BATCH), strict=True):
        scores = image @ caption.T  # [b, b]
        own = scores.diagonal()[:, None]
        places.append((scores >= own).tril(-1).sum(1) + (scores > own).triu(1).sum(1))
    return torch.cat(places)
