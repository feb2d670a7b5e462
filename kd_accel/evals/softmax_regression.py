"""Softmax regression on all rows at once, in fp64, with the optimizer of scikit-learn's LogisticRegression.

    mean_i cross_entropy(W x_i + b, y_i)  +  |W|^2 / (2 C n)         scikit-learn's objective, divided by C n

n rows, d width, K classes. The sum over rows is computed where the features lie, L-BFGS itself (scipy) on the CPU.
torch's L-BFGS needs 15 times the iterations where the penalty is large.
"""

from __future__ import annotations

import torch
from torch import Tensor

GRADIENT_TOLERANCE = 1e-7  # of its largest entry; scikit-learn's default of 1e-4 shows in the predictions
LOSS_TOLERANCE = 64 * torch.finfo(torch.float64).eps  # relative; scikit-learn's
LOGITS_AT_ONCE = 2**24  # entries of the matrix of logits that exist at a time: 128 MiB


def fit(
    features: Tensor, labels: Tensor, *, c: float, max_iter: int, start: Tensor | None = None
) -> tuple[Tensor, bool]:
    """(weights [K, d + 1] fp64 at the minimum, whether it was reached within `max_iter` iterations).

    features [n, d] fp64, labels [n] int64 in 0..K-1; W and, as the last column, b. `start` [K, d + 1] saves iterations.
    """
    from scipy.optimize import minimize  # takes half a second to import: only for those who probe

    shape = (int(labels.max()) + 1, features.shape[1] + 1)
    start = torch.zeros(shape, dtype=torch.float64) if start is None else start.cpu()

    def objective(flat):
        weights = torch.from_numpy(flat).view(shape).to(features.device)
        loss, gradient = loss_and_gradient(weights, features, labels, c=c)
        return loss.item(), gradient.cpu().numpy().ravel()

    options = {"maxiter": max_iter, "maxls": 50, "gtol": GRADIENT_TOLERANCE, "ftol": LOSS_TOLERANCE}
    found = minimize(objective, start.numpy().ravel(), jac=True, method="L-BFGS-B", options=options)
    return torch.from_numpy(found.x).view(shape).to(features.device), bool(found.success)


def logits(weights: Tensor, features: Tensor) -> Tensor:
    """[K, d + 1], [n, d] -> [n, K]."""
    return torch.addmm(weights[:, -1], features, weights[:, :-1].T)


def loss_and_gradient(weights: Tensor, features: Tensor, labels: Tensor, *, c: float) -> tuple[Tensor, Tensor]:
    """The objective [] and its gradient [K, d + 1]; a few rows at a time, the same ones on every call."""
    n = len(features)
    penalised = torch.cat([weights[:, :-1], torch.zeros_like(weights[:, -1:])], dim=1)  # the bias goes free
    loss, gradient = penalised.square().sum() / (2 * c * n), penalised / (c * n)
    chunk_rows = max(1, LOGITS_AT_ONCE // len(weights))
    for rows, truths in zip(features.split(chunk_rows), labels.split(chunk_rows), strict=True):
        log_probabilities = logits(weights, rows).log_softmax(dim=1)
        own = torch.arange(len(rows), device=rows.device), truths
        loss -= log_probabilities[own].sum() / n
        errors = log_probabilities.exp_()
        errors[own] -= 1
        gradient[:, :-1] += errors.T @ rows / n
        gradient[:, -1] += errors.sum(dim=0) / n
    return loss, gradient
