"""Places and recalls are those of a full sort, in tiles of any shape, with several captions per image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kd_accel.eval_config import MeasureConfig
from kd_accel.evals.find import find_sets
from kd_accel.evals.measure import OnSet, measure
from kd_accel.evals.plan import Job
from kd_accel.evals.retrieval import fixed_point, places, recall


def random_set(num_images: int = 40, *, width: int = 6):
    """Images with 1 to 4 captions each, near enough to their image that every recall lies between 0 and 1."""
    owner = torch.arange(num_images).repeat_interleave(torch.randint(1, 5, (num_images,)))
    images = torch.randn(num_images, width)
    texts = images[owner] / images[owner].norm(dim=1, keepdim=True) + 0.6 * torch.randn(len(owner), width)
    return images, texts, owner


def sorted_places(images, texts, owner):
    """One query at a time, by sorting its whole row: the place of its image, the best place of its captions."""
    scores = F.cosine_similarity(texts[:, None].double(), images[None].double(), dim=-1).numpy().round(12)  # [m, n]
    owner = owner.numpy()
    of_images = [
        np.flatnonzero(np.argsort(-row, kind="stable") == own)[0] for row, own in zip(scores, owner, strict=True)
    ]
    of_texts = [
        np.flatnonzero(owner[np.argsort(-column, kind="stable")] == image)[0] for image, column in enumerate(scores.T)
    ]
    return np.array(of_images), np.array(of_texts)


def test_recall_and_mean_rank_are_those_of_a_sort():
    """Both directions; a rank counts from 1."""
    images, texts, owner = random_set()
    expected = dict(zip(("image", "text"), sorted_places(images, texts, owner), strict=True))
    ours = recall(images, texts, owner)
    for what, found in expected.items():
        for k in (1, 5, 10):
            assert 0 < (found < k).mean() < 1
            assert ours[f"{what}_retrieval_recall@{k}"] == (found < k).mean()
        assert ours[f"{what}_mean_rank"] == pytest.approx(np.mean(found + 1))
    assert ours["mean_recall@1"] == pytest.approx(np.mean([(found < 1).mean() for found in expected.values()]))


@pytest.mark.parametrize("tile", [(1, 1), (7, 5), (1000, 1), (3, 1000)])
def test_tiles_change_nothing(tile):
    """Neither their shape nor a rest at the edges; copies of images and captions lie in different tiles and tie."""
    images, texts, owner = random_set(width=64)
    images[20:30], texts[50:60] = images[:10], texts[:10]
    found = places(images, texts, owner, tile=tile)
    for ours, sorts in zip(found, sorted_places(images, texts, owner), strict=True):
        assert ours.tolist() == sorts.tolist()


def test_scores_are_exact():
    """float64 gives the whole number that Python's integers give, for the longest sums of all: a row with itself."""
    rows = fixed_point(torch.cat([torch.randn(20, 512), torch.ones(1, 512), torch.eye(512)[:1]]))
    scores = rows.double() @ rows.double().T
    whole = [[sum(a * b for a, b in zip(x, y, strict=True)) for y in rows.tolist()] for x in rows.tolist()]
    assert [[int(score) for score in line] for line in scores.tolist()] == whole


def test_length_changes_nothing():
    """Features may have any length, and one that is a multiple of another ties with it."""
    images = torch.tensor([[3.0, 4.0], [0.75, 1.0], [96.0, 128.0]])
    texts = torch.tensor([[6.0, 8.0]]).expand(3, 2)
    of_images, of_texts = places(images, texts, torch.arange(3))
    assert of_images.tolist() == of_texts.tolist() == [0, 1, 2]


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
    assert metrics["image_mean_rank"] == metrics["text_mean_rank"] == 2


@pytest.mark.parametrize(
    ("scores", "own", "place"),
    [
        ([1, 1, 1, 1], [2], 2),  # equal scores: the lower index first
        ([1, 1, 1, 1], [1, 3], 1),  # of two captions the better placed one
        ([3, 1, 2, 3], [1, 3], 1),  # the best caption is not the first one, and ties with candidate 0
        ([1, 3, 3], [0, 2], 1),  # a worse caption with a lower index does not win the tie
        ([0, 5, 5, 0], [1], 0),  # a tie with a later index costs nothing
        ([9, 8, 7, 6], [3], 3),
    ],
)
@pytest.mark.parametrize("tile", [(100, 100), (1, 1)])
def test_ties_have_one_outcome(scores, own, place, tile):
    """A candidate comes before the best right one with a greater score, or an equal one and a lower index."""
    # image 0 has the captions `own`, image 1 the others; scores with image 0 are cosines, in the order of `scores`
    angles = (10 - torch.tensor(scores)) / 10
    texts = torch.stack([angles.cos(), angles.sin()], 1)
    owner = torch.ones(len(scores), dtype=torch.int64)
    owner[own] = 0
    assert places(torch.eye(2), texts, owner, tile=tile)[1][0] == place


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_matrix_of_all_pairs_exists():
    """3000 captions x 2000 images: nothing is larger than a tile or the features."""
    texts, images = torch.randn(3000, 4), torch.randn(2000, 4)
    owner = torch.arange(3000) % 2000
    with LargestTensor() as largest:
        places(images, texts, owner, tile=(64, 128))
    assert largest.elements <= max(64 * 128, texts.numel())


def test_an_unreadable_image_takes_its_captions_with_it(encoder, tmp_path, write_benchmark, captioned):
    """Recall over a set with a broken image is recall over the set without it."""
    samples = captioned([1, 3, 2, 1, 2, 4, 1, 1, 3])
    whole = write_benchmark(tmp_path / "whole", {key: s for key, s in samples.items() if key != "s0001"})
    samples["s0001"]["png"] = b"no image"
    broken = write_benchmark(tmp_path / "broken", samples)
    # batches of one row: leaving one out must not change the others' rounding
    config = MeasureConfig(data=str(tmp_path), batch_size=1, num_workers=0)
    rows = [measure(OnSet(encoder, Job(eval_set), config), "retrieval") for eval_set in find_sets([whole, broken])]
    assert rows[0]["metrics"] == rows[1]["metrics"]
    assert [row["n"] for row in rows] == [8, 8]
