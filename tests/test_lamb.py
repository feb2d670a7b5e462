"""LAMB in one process: timm's numbers on whole parameters, and the same on flat tensors that hold pieces of them."""

from __future__ import annotations

import pytest
import timm.optim
import torch
from torch import Tensor

from kd_accel.lamb import Lamb

OPTIONS = {"lr": 0.1, "betas": (0.9, 0.98), "eps": 1e-6}


def groups_of(parameters: list[Tensor]) -> list[dict]:
    """Matrices decay, vectors do not, as in optim.py."""
    decay, plain = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
    return [{"params": decay, "weight_decay": 0.3}, {"params": plain, "weight_decay": 0.0}]


def gradients(parameters: list[Tensor], steps: int) -> list[list[Tensor]]:
    """For every step one gradient per parameter, of norms far from 1."""
    return [[20 * torch.randn_like(p) for p in parameters] for _ in range(steps)]


def train(optimizer: torch.optim.Optimizer, parameters: list[Tensor], steps: list[list[Tensor]]) -> None:
    for k, values in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = OPTIONS["lr"] / (k + 1)
        for parameter, gradient in zip(parameters, values, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_timm_bit_for_bit(dtype):
    """Seven steps with a moving rate; among the parameters are zeros, and one whose gradient is zero."""
    start = [torch.randn(5, 7), torch.zeros(4, 3), torch.randn(6), torch.zeros(2), torch.randn(3, 2, 2, 2)]
    start = [p.to(dtype) for p in start]
    steps = gradients(start, 7)
    for values in steps:
        values[-1].zero_()
    ours, theirs = [p.clone() for p in start], [p.clone() for p in start]
    train(Lamb(groups_of(ours), **OPTIONS), ours, steps)
    train(timm.optim.Lamb(groups_of(theirs), **OPTIONS, max_grad_norm=None), theirs, steps)
    assert all(torch.equal(our, their) for our, their in zip(ours, theirs, strict=True))
    assert not any(torch.equal(our, first) for our, first in zip(ours, start, strict=True))


def test_first_step_by_hand():
    """Bias correction makes the first update g / |g| per element; the step is lr * |w| along update + decay * w."""
    matrix, vector = torch.tensor([[3.0, 4.0]]), torch.tensor([3.0, 4.0])
    optimizer = Lamb(groups_of([matrix, vector]), **OPTIONS)
    matrix.grad, vector.grad = torch.tensor([[1e3, -1e3]]), torch.tensor([1e3, -1e3])
    optimizer.step()
    update = torch.tensor([[1 + 0.3 * 3, -1 + 0.3 * 4]])
    torch.testing.assert_close(matrix, torch.tensor([[3.0, 4.0]]) - 0.1 * 5 * update / update.norm())
    torch.testing.assert_close(vector, torch.tensor([3.0 - 0.1, 4.0 + 0.1]))  # without decay: Adam's own step


def test_state_is_that_of_adamw():
    """Every tensor counts its own steps; no gradient, no state; gradients stay as they are."""
    moved, still = torch.randn(3, 2), torch.randn(2, 2)
    adamw, lamb = torch.optim.AdamW([moved.clone()]), Lamb(groups_of([moved, still]), **OPTIONS)
    (twin,) = adamw.param_groups[0]["params"]
    for optimizer, parameter in ((adamw, twin), (lamb, moved)):
        parameter.grad = torch.ones(3, 2)
        optimizer.step(), optimizer.step()
        assert torch.equal(parameter.grad, torch.ones(3, 2))
    (ours,), (theirs,) = lamb.state.values(), adamw.state.values()
    assert {key: (value.shape, value.dtype) for key, value in ours.items()} == {
        key: (value.shape, value.dtype) for key, value in theirs.items()
    }
    assert ours["step"] == theirs["step"] == 2


def test_pieces_of_a_flat_tensor_equal_whole_parameters():
    """Padding, not a number here, is in no norm; neither is a parameter that lies on other ranks alone. fp64, 1e-12."""
    whole = [torch.randn(2, 3).double(), torch.randn(4, 2).double()]
    steps = gradients(whole, 5)
    padding = torch.full((2,), float("nan")).double()

    def flattened(tensors: list[Tensor]) -> Tensor:
        return torch.cat([tensors[0].flatten(), padding, tensors[1].flatten(), padding])

    flat = flattened(whole)
    ours = Lamb([{"params": [flat], "weight_decay": 0.3}], **OPTIONS)
    ours.attach({flat: [slice(0, 6), slice(0, 0), slice(8, 16)]}, device=flat.device)
    train(ours, [flat], [[flattened(values)] for values in steps])
    train(Lamb(groups_of(whole), **OPTIONS), whole, steps)
    torch.testing.assert_close(flat, flattened(whole), rtol=1e-12, atol=1e-12, equal_nan=True)


def test_tensors_of_a_group_may_be_stepped_one_after_another():
    """As DeepSpeed steps the sub-groups of ZeRO-3: the same numbers and step counts as all at once."""
    start = [torch.randn(3, 2), torch.randn(2, 5)]
    steps = gradients(start, 3)
    together, apart = [p.clone() for p in start], [p.clone() for p in start]
    train(Lamb(groups_of(together)[:1], **OPTIONS), together, steps)
    optimizer = Lamb(groups_of(apart)[:1], **OPTIONS)
    (group,) = optimizer.param_groups
    for k, values in enumerate(steps):
        for parameter, gradient in zip(apart, values, strict=True):
            group["params"], group["lr"], parameter.grad = [parameter], OPTIONS["lr"] / (k + 1), gradient
            optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(together, apart, strict=True))
    assert [state["step"].item() for state in optimizer.state.values()] == [3, 3]
