"""BatchNorm with bf16 weights and fp32 statistics, as DeepSpeed leaves it; the mean over ranks of a rank alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import nn

from kd_accel.models.running_stats import (
    allow_bf16_weights,
    average_over_ranks,
    normalises_over_batches,
    running_statistics,
)


def as_deepspeed_casts(module: nn.Module) -> nn.Module:
    """Parameters, not buffers."""
    for parameter in module.parameters():
        parameter.data = parameter.data.bfloat16()
    return module


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNormAct2d])
def test_outputs_and_gradients_are_those_of_the_same_weights_in_fp32(kind, training):
    """Of bf16 rows, rounded to bf16 at the end alone; a subclass with a forward of its own (norm, then ReLU) too."""
    norm = kind(4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    as_deepspeed_casts(norm).train(training)
    allow_bf16_weights(norm)
    rows = torch.randn(8, 4, 2, 2).bfloat16().requires_grad_()
    weight, bias = (p.detach().float().requires_grad_() for p in (norm.weight, norm.bias))
    mean, var = torch.zeros(4), torch.ones(4)
    expected = F.batch_norm(rows, mean, var, weight, bias, training)
    expected = expected.relu() if kind is BatchNormAct2d else expected
    said = norm(rows)
    torch.testing.assert_close(said, expected, rtol=0, atol=0)
    given = torch.autograd.grad(said.square().sum(), [rows, norm.weight, norm.bias])
    wanted = torch.autograd.grad(expected.square().sum(), [rows, weight, bias])
    torch.testing.assert_close(given, tuple(gradient.bfloat16() for gradient in wanted), rtol=0, atol=0)
    assert running_statistics(norm)["running_var"].dtype == torch.float32
    torch.testing.assert_close((norm.running_mean, norm.running_var), (mean, var), rtol=0, atol=0)


def test_weights_come_back_after_an_error():
    """Of a forward pass that fails half way."""
    norm = as_deepspeed_casts(nn.BatchNorm1d(4))
    allow_bf16_weights(norm)
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        norm(torch.zeros(4).bfloat16())
    assert norm.weight is norm.get_parameter("weight")


def test_norms_without_weights_or_statistics():
    """Barlow's has no weights, some of timm's no statistics."""
    model = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.BatchNorm1d(4, track_running_stats=False))
    allow_bf16_weights(as_deepspeed_casts(model))
    assert model(torch.randn(8, 4).bfloat16()).dtype == torch.bfloat16
    assert running_statistics(model).keys() == {"0.running_mean", "0.running_var", "0.num_batches_tracked"}


def test_frozen_norms_do_not_normalise_over_batches():
    frozen = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).requires_grad_(False)
    assert not normalises_over_batches(frozen)
    assert not normalises_over_batches(nn.LayerNorm(4))
    assert normalises_over_batches(nn.Sequential(frozen, nn.BatchNorm2d(4)))
    assert normalises_over_batches(nn.BatchNorm2d(4, affine=False))


def test_alone_nothing_is_averaged():
    norm = nn.BatchNorm1d(4)
    norm(torch.randn(8, 4))
    before = {name: b.clone() for name, b in running_statistics(norm).items()}
    average_over_ranks(norm)
    torch.testing.assert_close(running_statistics(norm), before, rtol=0, atol=0)
