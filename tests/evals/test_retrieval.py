"""Recall@k agrees with a brute-force sort, in any chunking, with several captions per image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kd_accel.eval_config import MeasureConfig
from kd_accel.evals.find import find_sets
from kd_accel.evals.measure import measure
from kd_accel.evals.retrieval import rank_of_match, recall


def random_set(num_images: int = 40):
    """Images with 1 to 4 captions each, near enough to their image that every recall lies between 0 and 1."""
    owner = torch.arange(num_images).repeat_interleave(torch.randint(1, 5, (num_images,)))
    images = F.normalize(torch.randn(num_images, 6), dim=-1)
    texts = F.normalize(images[owner] + 0.8 * torch.randn(len(owner), 6), dim=-1)
    return images, texts, owner


def brute_force(images, texts, owner):
    """One query at a time: the ids of the sorted candidates, and whether the right one is among the first k."""
    scores = texts.double().numpy() @ images.double().numpy().T  # [m, n]
    owner = owner.numpy()
    found = {}
    for k in (1, 5, 10):
        hits = [owner[j] in np.argsort(-scores[j])[:k] for j in range(len(owner))]
        found[f"image_retrieval_recall@{k}"] = np.mean(hits)
        hits = [i in owner[np.argsort(-scores[:, i])[:k]] for i in range(len(images))]
        found[f"text_retrieval_recall@{k}"] = np.mean(hits)
    return found


def test_recall_equals_brute_force():
    """Both directions, for k = 1, 5, 10."""
    images, texts, owner = random_set()
    ours, expected = recall(images, texts, owner), brute_force(images, texts, owner)
    assert 0 < expected["text_retrieval_recall@1"] < expected["text_retrieval_recall@10"] < 1
    assert ours == pytest.approx(expected)


@pytest.mark.parametrize("chunk_rows", [1, 7])
def test_chunked_equals_unchunked(chunk_rows):
    """The number of queries at a time, also one that leaves a rest, does not change a recall."""
    images, texts, owner = random_set()
    assert recall(images, texts, owner, chunk_rows=chunk_rows) == recall(images, texts, owner, chunk_rows=10_000)


def test_owners_need_no_order():
    """Captions may come in any order."""
    images, texts, owner = random_set()
    shuffled = torch.randperm(len(owner))
    assert recall(images, texts[shuffled], owner[shuffled]) == pytest.approx(recall(images, texts, owner))


def test_more_places_than_candidates():
    """Two images: everything is among the first five."""
    metrics = recall(torch.eye(2), torch.eye(2).flip(0), torch.arange(2))
    assert metrics["image_retrieval_recall@1"] == 0
    assert metrics["image_retrieval_recall@5"] == metrics["text_retrieval_recall@10"] == 1


@pytest.mark.parametrize(
    ("scores", "match", "rank"),
    [
        ([1, 1, 1, 1], [0, 0, 1, 0], 2),  # equal scores: the lower index first
        ([1, 1, 1, 1], [0, 1, 0, 1], 1),  # of two matches the better placed one
        ([3, 1, 2, 3], [0, 1, 0, 1], 1),  # the best match is not the first one, and ties with candidate 0
        ([1, 3, 3], [1, 0, 1], 1),  # a worse match with a lower index does not win the tie
        ([0, 5, 5, 0], [0, 1, 0, 0], 0),  # a tie with a later index costs nothing
        ([9, 8, 7, 6], [0, 0, 0, 1], 3),
    ],
)
def test_ties_have_one_outcome(scores, match, rank):
    """A candidate comes before the best match with a greater score, or an equal one and a lower index."""
    assert rank_of_match(torch.tensor([scores]).float(), torch.tensor([match]).bool()).tolist() == [rank]


def test_an_unreadable_image_takes_its_captions_with_it(encoder, tmp_path, write_benchmark, captioned):
    """Recall over a set with a broken image is recall over the set without it."""
    samples = captioned([1, 3, 2, 1, 2, 4, 1, 1, 3])
    whole = write_benchmark(tmp_path / "whole", {key: s for key, s in samples.items() if key != "s0001"})
    samples["s0001"]["png"] = b"no image"
    broken = write_benchmark(tmp_path / "broken", samples)
    # batches of one row: leaving one out must not change the others' rounding
    config = MeasureConfig(data=str(tmp_path), batch_size=1, num_workers=0)
    rows = [measure(encoder, eval_set, config) for eval_set in find_sets([whole, broken])]
    assert rows[0]["metrics"] == rows[1]["metrics"]
    assert [row["n"] for row in rows] == [8, 8]
