"""Losses over a row of similarities against everyone's columns: InfoNCE and the pairwise sigmoid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def similarity_logits(
    rows: Float[Tensor, "b d"], columns: Float[Tensor, "B d"], scale: Float[Tensor, ""] | Float[Tensor, "b 1"] | float
) -> Float[Tensor, "b B"]:
    """scale * <row_i, column_j>; unit rows and columns make it scale * cosine. A scale may be one number per row."""
    return scale * rows @ columns.T


def positives(logits: Float[Tensor, "b B"], offset: int) -> Float[Tensor, "b"]:
    """The logit of each row's own partner: column offset + i."""
    return logits.diagonal(offset)[: len(logits)]


def info_nce(logits: Float[Tensor, "b B"], offset: int) -> Float[Tensor, "b"]:
    """-log softmax(logits)[i, offset + i] of each row (CLIP, arXiv 2103.00020, fig. 3)."""
    partners = torch.arange(offset, offset + len(logits), device=logits.device)
    return F.cross_entropy(logits, partners, reduction="none")


def pairwise_sigmoid(logits: Float[Tensor, "b B"], offset: int) -> Float[Tensor, "b"]:
    """sum_j softplus(-y_ij z_ij) of each row; y is +1 for the row's partner, else -1 (SigLIP, arXiv 2303.15343)."""
    # softplus(z) over all pairs, then the one positive of the row is turned: softplus(-z) = softplus(z) - z.
    return F.softplus(logits).sum(dim=1) - positives(logits, offset)


def partner_probability(logits: Float[Tensor, "b B"], offset: int) -> Float[Tensor, "b"]:
    """softmax(logits)[i, offset + i]: how sure a model is of the right partner, in (0, 1)."""
    return torch.exp(-info_nce(logits, offset))
