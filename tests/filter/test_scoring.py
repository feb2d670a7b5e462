"""Scores of images by prompts: what brute force over all pairs gives, whatever the shards, chunks and ties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kd_accel.filter import scoring
from kd_accel.filter.scoring import TopK, distinct, score_shard

N, P, D = 130, 7, 8


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Several chunks per shard, the last one short."""
    monkeypatch.setattr(scoring, "ROWS", 16)


def unit(rows, width=D):
    return F.normalize(torch.randn(rows, width), dim=1)


def names(count):
    """Keys in an order of their own."""
    return np.array([f"k{(i * 37) % count:04d}" for i in range(count)])


def scored(features, keys, prompts, sizes, k):
    """(best, scores, top) over shards of the given sizes."""
    top, found, start = TopK(len(prompts), k), [], 0
    for shard, size in enumerate(sizes):
        rows = slice(start, start + size)
        found.append(score_shard(features[rows], keys[rows], prompts, shard=shard, top=top))
        start += size
    best, scores = (np.concatenate(column) for column in zip(*found, strict=True))
    return best, scores, top


def by_brute_force(features, keys, prompts, k):
    """{prompt: keys of its k best, best first}."""
    cosines = (F.normalize(features.float(), dim=1) @ prompts.T).numpy()
    ranked = [sorted(zip(-cosines[:, p], keys, strict=True))[:k] for p in range(len(prompts))]
    return {p: [key for _, key in best] for p, best in enumerate(ranked)}


def by_prompt(top):
    return {p: top.key[top.prompt == p].tolist() for p in range(len(top.floor))}


@pytest.mark.parametrize("sizes", [[N], [1, 60, 69], [13] * 10])
@pytest.mark.parametrize("k", [1, 5, 20, 200])
def test_the_best_of_each_prompt_are_those_of_all_pairs(sizes, k):
    """More than a chunk, a shard or all images have, too."""
    features, prompts, keys = torch.randn(N, D).half(), unit(P), names(N)
    best, scores, top = scored(features, keys, prompts, sizes, k)
    assert by_prompt(top) == by_brute_force(features, keys, prompts, k)
    cosines = F.normalize(features.float(), dim=1) @ prompts.T
    assert best.tolist() == cosines.argmax(1).tolist()
    torch.testing.assert_close(torch.from_numpy(scores), cosines.amax(1))
    starts = np.cumsum([0, *sizes])
    assert keys[starts[top.shard] + top.row].tolist() == top.key.tolist()


def test_ties_go_to_the_lower_key():
    """Copies of five images: which of them are kept depends neither on their place nor on the shards."""
    five, prompts, keys = torch.randn(5, D), unit(P), names(N)
    features = five[torch.arange(N) % 5]
    expected = by_brute_force(features, keys, prompts, 9)
    for sizes in ([N], [40, 90], [10] * 13):
        assert by_prompt(scored(features, keys, prompts, sizes, 9)[2]) == expected
    mixed = torch.randperm(N)
    assert by_prompt(scored(features[mixed], keys[mixed], prompts, [N], 9)[2]) == expected


def test_equal_prompts_go_to_the_first():
    best, _, _ = scored(torch.randn(N, D), names(N), unit(1).expand(3, D), [N], 1)
    assert best.tolist() == [0] * N


def test_rows_without_features_have_no_score():
    """nan and infinite ones are prompt -1 and in nobody's best; all others are as if they were not there."""
    features, prompts, keys = torch.randn(N, D), unit(P), names(N)
    features[3, 2], features[77] = torch.nan, torch.inf
    best, scores, top = scored(features, keys, prompts, [N], 200)
    assert np.flatnonzero(np.isnan(scores)).tolist() == np.flatnonzero(best < 0).tolist() == [3, 77]
    others = [i for i in range(N) if i not in (3, 77)]
    assert by_prompt(top) == by_brute_force(features[others], keys[others], prompts, 200)


def test_candidates_of_shards_add_up():
    """What each shard leaves behind is enough to find the best of all, in whatever order the shards came."""
    features, prompts, keys = torch.randn(N, D), unit(P), names(N)
    starts = [0, 30, 60, N]
    whole = scored(features, keys, prompts, np.diff(starts), 6)[2]
    first = TopK(P, 6)
    parts = {}
    for shard in (2, 0, 1):
        rows = slice(starts[shard], starts[shard + 1])
        score_shard(features[rows], keys[rows], prompts, shard=shard, top=first)
        parts[shard] = first.of_shard(shard)
    again = TopK(P, 6)
    for shard in range(3):
        again.add(**parts[shard])
    for top in (first, again):
        assert by_prompt(top) == by_prompt(whole)
        assert (top.floor == whole.floor).all()
        assert (top.score == whole.score).all()


def test_near_duplicates_are_dropped_greedily():
    """As one loop over all rows does it: a row goes if an earlier kept one is near, not if a dropped one is."""
    features = unit(20)[torch.arange(N) % 20] + 0.2 * torch.randn(N, D)
    rows = F.normalize(features, dim=1)
    cosines, kept = rows @ rows.T, []
    for i in range(N):
        if all(cosines[i, j] < 0.8 for j in kept):
            kept.append(i)
    assert 20 <= len(kept) < N - 20
    assert np.flatnonzero(distinct(features, 0.8)).tolist() == kept


def test_a_chain_of_near_rows_keeps_every_second():
    """0, 30, 60, 90 degrees, threshold between 30 and 60: 60 stays because 30, to which it is near, is gone."""
    angles = torch.tensor([0.0, 30, 60, 90]).deg2rad()
    rows = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert distinct(rows, 0.8).tolist() == [True, False, True, False]
