"""The statistics are those of the whole matrices, by other people's functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics.pairwise import cosine_similarity

from kd_accel.evals import statistics
from kd_accel.evals.statistics import feature_statistics


def captioned(n: int = 40, d: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images and 1 to 3 captions of each, the captions in no order, all of different lengths and off the origin."""
    owner = torch.cat([torch.full((1 + i % 3,), i) for i in range(n)])[torch.randperm(79)]
    return torch.randn(n, d) + 0.5, 3 * torch.randn(len(owner), d) - 1, owner


@pytest.mark.parametrize("chunk_rows", [1024, 7])
def test_statistics_are_those_of_the_whole_matrices(monkeypatch, chunk_rows):
    """numpy and scikit-learn, all similarities at once."""
    monkeypatch.setattr(statistics, "CHUNK_ROWS", chunk_rows)
    images, texts, owner = captioned()
    x = F.normalize(images, dim=1).numpy()
    y = F.normalize(texts, dim=1).numpy()[[owner.tolist().index(i) for i in range(len(images))]]

    def positive(features):
        similarities = cosine_similarity(features)
        assert (similarities < 0).any(), "nothing to leave out"
        return similarities[similarities > 0].mean()

    assert feature_statistics(images, texts, owner) == {
        "modality_gap": pytest.approx(np.linalg.norm(x.mean(0) - y.mean(0))),
        "positive_pair_similarity": pytest.approx(np.mean([a @ b for a, b in zip(x, y, strict=True)])),
        "image_avg_self_similarity": pytest.approx(positive(x)),
        "text_avg_self_similarity": pytest.approx(positive(y)),
        "image_feature_std": pytest.approx(x.std(0, ddof=1).mean()),
        "text_feature_std": pytest.approx(y.std(0, ddof=1).mean()),
    }


def test_equal_towers_have_no_gap():
    """Captions that lie on their images: distance 0, cosine 1."""
    images = torch.randn(10, 4)
    found = feature_statistics(images, 2 * images, torch.arange(10))
    assert found["modality_gap"] == 0
    assert found["positive_pair_similarity"] == pytest.approx(1)
    assert found["image_avg_self_similarity"] == found["text_avg_self_similarity"]


def test_opposite_towers_are_two_apart():
    """All images at one pole, all captions at the other: the farthest that unit rows can be."""
    pole = torch.tensor([[0.0, 3.0]]).repeat(5, 1)
    assert feature_statistics(pole, -pole, torch.arange(5)) == {
        "modality_gap": 2,
        "positive_pair_similarity": -1,
        "image_avg_self_similarity": 1,
        "text_avg_self_similarity": 1,
        "image_feature_std": 0,
        "text_feature_std": 0,
    }


def test_rows_that_are_all_zero_are_like_nothing():
    """As of a model whose last layer died: no cosine is above 0."""
    found = feature_statistics(torch.zeros(3, 4), torch.randn(3, 4), torch.arange(3))
    assert found["image_avg_self_similarity"] is None
    assert found["text_avg_self_similarity"] > 0


def test_one_image_has_no_deviation():
    found = feature_statistics(torch.ones(1, 4), torch.ones(2, 4), torch.tensor([0, 0]))
    assert found["image_feature_std"] is None
    assert found["image_avg_self_similarity"] == pytest.approx(1)
