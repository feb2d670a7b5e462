"""InfoNCE and the pairwise sigmoid: against the papers written as loops, open_clip's modules, and finite differences.

b rows, B columns, row i's partner is column offset + i.
"""

from __future__ import annotations

import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from kd_accel.losses import contrastive

SCALE, BIAS = 1 / 0.07, -10.0
FORMULAS = [contrastive.info_nce, contrastive.pairwise_sigmoid, contrastive.partner_probability]


def _logits(b: int, columns: int) -> torch.Tensor:
    """What a half-trained model gives, [b, B] float64."""
    return 3 * torch.randn(b, columns, dtype=torch.float64)


def _unit(rows: int, width: int = 5) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, dtype=torch.float64), dim=1)


@pytest.mark.parametrize("offset", [0, 2, 4])
def test_info_nce_is_the_papers_loop(offset):
    """-log(exp z_ii / sum_j exp z_ij), whichever column holds the partner."""
    logits = _logits(3, 7)
    slow = []
    for i, row in enumerate(logits.tolist()):
        slow.append(-math.log(math.exp(row[offset + i]) / sum(math.exp(z) for z in row)))
    torch.testing.assert_close(contrastive.info_nce(logits, offset), torch.tensor(slow, dtype=torch.float64))


@pytest.mark.parametrize("offset", [0, 2, 4])
def test_pairwise_sigmoid_is_the_papers_loop(offset):
    """sum_j -log sigmoid(y_ij z_ij), y = +1 for the partner and -1 elsewhere."""
    logits = _logits(3, 7)
    slow = []
    for i, row in enumerate(logits.tolist()):
        labels = [1 if j == offset + i else -1 for j in range(7)]
        slow.append(-sum(math.log(1 / (1 + math.exp(-y * z))) for y, z in zip(labels, row, strict=True)))
    torch.testing.assert_close(contrastive.pairwise_sigmoid(logits, offset), torch.tensor(slow, dtype=torch.float64))


def test_partner_probability_is_the_softmax_at_the_partner():
    """It is one entry of the row's softmax."""
    logits = _logits(3, 7)
    expected = logits.softmax(dim=1)[torch.arange(3), torch.arange(2, 5)]
    torch.testing.assert_close(contrastive.partner_probability(logits, 2), expected)


def test_similarity_logits_are_scaled_cosines():
    """Entry ij is scale * cosine of row i and column j."""
    rows, columns = _unit(3), _unit(4)
    expected = SCALE * F.cosine_similarity(rows[:, None], columns[None], dim=2)
    torch.testing.assert_close(contrastive.similarity_logits(rows, columns, SCALE), expected)


def test_mean_over_both_directions_is_open_clips_clip_loss():
    """ClipLoss is the mean of image-to-text and text-to-image InfoNCE."""
    image, text = _unit(6), _unit(6)
    logits = [contrastive.similarity_logits(*pair, SCALE) for pair in ((image, text), (text, image))]
    torch.testing.assert_close(
        sum(contrastive.info_nce(z, 0) for z in logits).mean() / 2, open_clip.ClipLoss()(image, text, SCALE)
    )


def test_mean_over_images_is_open_clips_siglip_loss():
    """SigLipLoss sums over captions and averages over images."""
    image, text = _unit(6), _unit(6)
    logits = contrastive.similarity_logits(image, text, SCALE) + BIAS
    actual = contrastive.pairwise_sigmoid(logits, 0).mean()
    torch.testing.assert_close(actual, open_clip.loss.SigLipLoss()(image, text, SCALE, BIAS))


@pytest.mark.parametrize("formula", FORMULAS)
def test_gradient_is_that_of_finite_differences(formula):
    """autograd's first derivative is right, with the partners off the main diagonal."""
    assert torch.autograd.gradcheck(lambda z: formula(z, 2), _logits(3, 7).requires_grad_())


@pytest.mark.parametrize("formula", FORMULAS)
def test_rows_and_columns_may_be_permuted_together(formula):
    """The order of the samples carries no meaning."""
    logits, order = _logits(6, 6), torch.randperm(6)
    torch.testing.assert_close(formula(logits[order][:, order], 0), formula(logits, 0)[order])


@pytest.mark.parametrize("formula", [contrastive.info_nce, contrastive.partner_probability])
def test_softmax_losses_ignore_a_shift_of_the_row(formula):
    """A constant on all logits of a row changes nothing; this is why clip ignores logit_bias."""
    logits = _logits(4, 6)
    torch.testing.assert_close(formula(logits + torch.randn(4, 1), 1), formula(logits, 1))


@pytest.mark.parametrize("formula", FORMULAS)
def test_large_logits_stay_finite(formula):
    """At temperature 0.01 logits reach +-100, whose exp overflows fp32: value and gradient are numbers all the same."""
    logits = torch.tensor([[-100.0, 100.0], [100.0, -100.0]], requires_grad=True)
    rows = formula(logits, 0)
    rows.sum().backward()
    assert torch.isfinite(rows).all()
    assert torch.isfinite(logits.grad).all()


def test_info_nce_of_equal_logits_is_log_of_the_columns():
    """A model that knows nothing guesses among B captions: ln B."""
    torch.testing.assert_close(contrastive.info_nce(torch.zeros(3, 7), 1), torch.full((3,), math.log(7)))


def test_shapes_are_checked_in_tests():
    """pytest runs kd_accel.losses under jaxtyping: --jaxtyping-packages=kd_accel.losses,beartype.beartype."""
    with pytest.raises(TypeCheckError):
        contrastive.info_nce(torch.zeros(4), 0)


def test_columns_of_another_width_are_refused():
    """The annotations say that rows and columns share d."""
    checked = jaxtyped(contrastive.similarity_logits, typechecker=beartype)
    with pytest.raises(TypeCheckError):
        checked(torch.zeros(3, 5), torch.zeros(4, 1), 1.0)
