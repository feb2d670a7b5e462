"""Which columns of padding go."""

from __future__ import annotations

import pytest
import torch

from kd_accel.trim import trimmed


def padded(*lengths: int, context: int = 20, pad: int = 0) -> torch.Tensor:
    """Rows of so many 5s, then padding."""
    return torch.stack([torch.tensor([5] * n + [pad] * (context - n)) for n in lengths])


@pytest.mark.parametrize(
    ("lengths", "kept"),
    [((3, 5), 8), ((8, 1), 8), ((9, 1), 16), ((17, 2), 20), ((20, 1), 20)],
    ids=["rounded up", "fits", "one more", "not beyond the context", "the context is full"],
)
def test_the_longest_caption_decides(lengths, kept):
    tokens = padded(*lengths)
    cut = trimmed(tokens, 0)
    assert torch.equal(cut, tokens[:, :kept])
    assert cut.untyped_storage().nbytes() == cut.nbytes  # no padding goes along to another process


def test_only_trailing_columns_of_the_pad_token_go():
    tokens = torch.tensor([[5, 0, 0, 5, 0, 0, 0, 0], [5, 0, 5, 0, 0, 0, 0, 0]])  # 0 is also a word of CLIP's
    assert torch.equal(trimmed(tokens, 0, multiple=1), tokens[:, :4])
    assert torch.equal(trimmed(tokens, 1, multiple=1), tokens)


def test_no_pad_no_cut():
    tokens = padded(2)
    assert torch.equal(trimmed(tokens, None), tokens)


def test_nothing_but_padding_keeps_columns():
    """A word table has no tokens for unknown words; its features still need a tensor to read."""
    assert trimmed(padded(0, 0), 0).shape == (2, 8)
