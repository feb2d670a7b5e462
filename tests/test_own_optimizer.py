"""AdamW of what the objective learns goes on from a checkpoint, whose tensors lie on the CPU, on any device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kd_accel.own_optimizer import OwnOptimizer
from kd_accel.schedules import Progress

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]


def scale(value: float, device: str) -> tuple[nn.Parameter, OwnOptimizer]:
    parameter = nn.Parameter(torch.tensor(value, device=device))
    return parameter, OwnOptimizer([parameter], nn.ModuleDict(), betas=(0.9, 0.98), eps=1e-8)


def step(parameter: nn.Parameter, optimizer: OwnOptimizer, gradient: float) -> None:
    parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step(Progress(), lr=0.0, temperature_lr=0.1)


def resumed(device: str) -> tuple[Tensor, Tensor]:
    """(after two steps, after a step, a checkpoint and another step)."""
    whole, optimizer = scale(2.0, device)
    step(whole, optimizer, 1.0)
    saved = {name: value.cpu() for name, value in optimizer.state({"log_scale": whole}).items()}
    halves, again = scale(0.0, device)
    with torch.no_grad():
        halves.copy_(whole)
    again.load_state({"log_scale": halves}, saved)
    for parameter, its_optimizer in ((whole, optimizer), (halves, again)):
        step(parameter, its_optimizer, -0.5)
    return whole.detach(), halves.detach()


@pytest.mark.parametrize("device", DEVICES)
def test_a_resumed_step_is_the_step(device):
    """Bit for bit."""
    whole, halves = resumed(device)
    assert halves.device.type == device
    assert torch.equal(whole, halves)


def test_moments_follow_their_parameter():
    """Parameters on a GPU, as torch pretends it without one: the resumed step finds its moments there."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        _, halves = resumed("cuda")
    assert halves.device.type == "cuda"
