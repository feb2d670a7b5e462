"""Which prompt an image fits best, which images fit a prompt best, which images are nearly the same. In bounded memory.

n images, P prompts, d embedding width, k best images per prompt, c rows at a time.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 4096  # c: P x ROWS similarities exist at a time


class TopK:
    """The `k` best images of each of `num_prompts` prompts among those added so far; of equal scores the lower key.

    prompt [m] int32, score [m] float32, key [m] str, shard [m] int32, row [m] int64: m <= P x k, by prompt, best first
    floor [P] float32: what an image has to reach to be among the k best
    """

    COLUMNS = {"prompt": np.int32, "score": np.float32, "key": np.str_, "shard": np.int32, "row": np.int64}

    def __init__(self, num_prompts: int, k: int):
        self.k = k
        self.floor = np.full(num_prompts, -np.inf, dtype=np.float32)
        for name, dtype in self.COLUMNS.items():
            setattr(self, name, np.empty(0, dtype=dtype))

    def add(self, **found: np.ndarray) -> None:
        """More candidates, as columns of one length."""
        columns = {name: np.concatenate([getattr(self, name), found[name]]) for name in self.COLUMNS}
        order = best_first(columns)
        prompt = columns["prompt"][order]
        begins = np.searchsorted(prompt, prompt)  # where the rows of the same prompt begin
        order = order[np.arange(len(order)) - begins < self.k]
        for name in self.COLUMNS:
            setattr(self, name, columns[name][order])
        last = np.flatnonzero(np.bincount(self.prompt, minlength=len(self.floor)) == self.k)
        self.floor[last] = self.score[np.searchsorted(self.prompt, last, side="right") - 1]

    def of_shard(self, shard: int) -> dict[str, np.ndarray]:
        """The columns of the candidates from one shard."""
        mine = self.shard == shard
        return {name: getattr(self, name)[mine] for name in self.COLUMNS}


def best_first(columns: dict[str, np.ndarray]) -> np.ndarray:  # [m] int64
    """The order by prompt, falling score, key. Keys are compared only where scores are equal: texts are slow."""
    order = np.lexsort((-columns["score"], columns["prompt"]))
    prompt, score = columns["prompt"][order], columns["score"][order]
    equal = (prompt[1:] == prompt[:-1]) & (score[1:] == score[:-1])
    tied = np.flatnonzero(np.append(equal, False) | np.insert(equal, 0, False))
    if len(tied):
        rows = order[tied]
        order[tied] = rows[np.lexsort((columns["key"][rows], -score[tied], prompt[tied]))]
    return order


def score_shard(
    features: np.ndarray | Tensor, keys: np.ndarray, prompts: Tensor, *, shard: int, top: TopK | None
) -> tuple[np.ndarray, np.ndarray]:  # [n] int32, [n] float32
    """(best prompt, its cosine) of each row of `features[n,d]`, any float; candidates go to `top`.

    `prompts[P,d]` are fp32 unit rows, `keys` [n] the images' names. Rows that are not finite score nan, and prompt -1.
    Of equal prompts the first is the best.
    """
    best, scores = np.full(len(features), -1, dtype=np.int32), np.full(len(features), np.nan, dtype=np.float32)
    for start in range(0, len(features), ROWS):
        rows = F.normalize(torch.as_tensor(features[start : start + ROWS]).float(), dim=1)
        usable = rows.isfinite().all(1).nonzero()[:, 0]
        cosines = rows[usable] @ prompts.T  # [c, P]
        values, places = cosines.max(1)
        at = start + usable.numpy()
        best[at], scores[at] = places.numpy(), values.numpy()
        if top is not None:
            row, prompt = (cosines >= _floor(cosines, top)).nonzero(as_tuple=True)
            score, row, prompt = cosines[row, prompt].numpy(), at[row.numpy()], prompt.numpy().astype(np.int32)
            top.add(prompt=prompt, score=score, key=keys[row], row=row, shard=np.full(len(row), shard, dtype=np.int32))
    return best, scores


def _floor(cosines: Tensor, top: TopK) -> Tensor:  # [c, P] -> [P]
    """What a row of `cosines` has to reach to be a candidate; in the first rows, that is to be among their k best."""
    floor = torch.from_numpy(top.floor)
    if len(cosines) > top.k and floor.isinf().any():
        return cosines.topk(top.k, dim=0).values[-1].maximum(floor)
    return floor


def distinct(features: Tensor, threshold: float) -> np.ndarray:  # [n, d] -> [n] bool
    """Which rows to keep so that no two of them have a cosine of `threshold` or more: greedily, the first rows win.

    Time grows with the square of what is kept; memory holds c x c similarities above `features`, which may be fp16.
    """
    keep = np.zeros(len(features), dtype=bool)
    for start in range(0, len(features), ROWS):
        rows = F.normalize(features[start : start + ROWS].float(), dim=1)
        alone = torch.ones(len(rows), dtype=torch.bool)
        for earlier in torch.from_numpy(np.flatnonzero(keep)).split(ROWS):
            alone &= ~(rows @ F.normalize(features[earlier].float(), dim=1).T >= threshold).any(1)
        left = alone.nonzero()[:, 0]
        keep[start + left.numpy()] = _greedy((rows[left] @ rows[left].T >= threshold).numpy())
    return keep


def _greedy(near: np.ndarray) -> np.ndarray:  # [c, c] bool -> [c] bool
    """Keep a row unless it is near to one that is kept before it."""
    keep = np.zeros(len(near), dtype=bool)
    for row in range(len(near)):
        keep[row] = not near[row, :row][keep[:row]].any()
    return keep
