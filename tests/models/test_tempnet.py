"""TempNet: its formula as a loop, its range, what passes at the range's ends, dropout, and the reference's numbers.

b rows, d width, M prototypes.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call

from kd_accel.models.tempnet import TempNet, dropout_mask
from kd_accel.terms import GlobalContrastive, NetworkTemperature

B, D, M, RHO = 5, 6, 4, 3.0
HEADS = ["tempnet", "disttempnet"]


def _config(head: str, **values) -> NetworkTemperature:
    """The section `network` as a term of the YAML completes it."""
    section = {"head": head, "prototypes": M, **values}
    return GlobalContrastive.model_validate({"temperature": "network", "network": section}).network


def _network(head: str, *, reference: bool = False, **values) -> TempNet:
    """In float64, with every parameter off its first value."""
    network = TempNet(D, _config(head, **values), rho=RHO, reference=reference).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return network


def _features(rows: int = B) -> Tensor:
    return F.normalize(torch.randn(rows, D, dtype=torch.float64), dim=1)


def _slow(network: TempNet, h: Tensor, low: float, high: float) -> float:
    """The temperature of one row, number by number."""
    x = [
        1 / (1 + math.exp(-(row @ h + c).item())) for row, c in zip(network.proj.weight, network.proj.bias, strict=True)
    ]
    r = [sum(a * b for a, b in zip(x, (p / p.norm()).tolist(), strict=True)) for p in network.prototypes]
    exps = [math.exp(value / math.exp(network.scaler.item())) for value in r]
    w, q = [e / sum(exps) for e in exps], [1 / (1 + math.exp(-value)) for value in r]
    first, bias = network.linear_1.weight[0].tolist(), network.linear_1.bias.item()
    if network.config.head == "tempnet":
        z = sum(a * (wm - 1 / M) * qm for a, wm, qm in zip(first, w, q, strict=True)) + bias
        return low + (high - low) / (1 + math.exp(-z))
    second = network.linear_2.weight[0].tolist()
    z = sum(a * wm * qm - c * qm / M for a, c, wm, qm in zip(first, second, w, q, strict=True)) + bias
    return min(max(z / network.rho, low), high)


@pytest.mark.parametrize("values", [{}, {"min": 0.02, "max": 0.04}], ids=["default range", "narrow range"])
@pytest.mark.parametrize("head", HEADS)
def test_temperatures_are_the_loops(head, values):
    """Every row by itself, as the class says it."""
    network, features = _network(head, **values), _features()
    low, high = network.config.min, network.config.max or math.inf
    expected = torch.tensor([_slow(network, h, low, high) for h in features], dtype=torch.float64)
    torch.testing.assert_close(network(features, None).detach(), expected)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("rows", [1, 2])
def test_any_number_of_rows(head, rows):
    """A batch of one gives one temperature, the one it has in a larger batch."""
    network, features = _network(head), _features()
    temperatures = network(features[:rows], None)
    assert temperatures.shape == (rows,)
    torch.testing.assert_close(temperatures, network(features, None)[:rows])


@pytest.mark.parametrize("head", HEADS)
def test_gradients_are_those_of_finite_differences(head):
    """Of every parameter, inside the range."""
    network, features = _network(head, min=1e-9), _features()
    with torch.no_grad():
        network.linear_1.bias.add_(1.0)  # far from the minimum
    names, values = zip(*network.named_parameters(), strict=True)
    assert torch.autograd.gradcheck(
        lambda *v: functional_call(network, dict(zip(names, v, strict=True)), (features, None)), values
    )


@pytest.mark.parametrize("head", HEADS)
def test_length_of_prototypes_carries_no_meaning(head):
    """They start as embeddings as they came, and count by their direction."""
    network, features = _network(head), _features()
    before = network(features, None)
    with torch.no_grad():
        network.prototypes.mul_(torch.rand(M, 1) + 0.5)
    torch.testing.assert_close(network(features, None), before)


# The range ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [-1e3, 1e3])
@pytest.mark.parametrize("head", HEADS)
def test_temperatures_stay_in_the_range(head, bias):
    """However far the network is pushed."""
    network = _network(head, min=0.01, max=0.2)
    with torch.no_grad():
        network.linear_1.bias.fill_(bias)
    expected = torch.full((B,), 0.01 if bias < 0 else 0.2, dtype=torch.float64)
    torch.testing.assert_close(network(_features(), None).detach(), expected)


@pytest.mark.parametrize(
    ("bias", "gradient", "passes"),
    [(-1e3, 1.0, False), (-1e3, -1.0, True), (1e3, 1.0, True), (1e3, -1.0, False), (0.3, 1.0, True), (0.3, -1.0, True)],
    ids=["low, further down", "low, up", "high, down", "high, further up", "inside, down", "inside, up"],
)
def test_only_outward_gradients_are_blocked(bias, gradient, passes):
    """Descent lowers a temperature whose gradient is positive; outside, only the way back is open."""
    network = _network("disttempnet", min=0.001, max=10.0)
    with torch.no_grad():
        network.linear_1.bias.fill_(bias * RHO)
    network(_features(), None).backward(torch.full((B,), gradient, dtype=torch.float64))
    expected = B * gradient / RHO if passes else 0.0
    torch.testing.assert_close(network.linear_1.bias.grad, torch.tensor([expected], dtype=torch.float64))


@pytest.mark.parametrize("gradient", [1.0, -1.0])
def test_the_published_clamp_is_dead_at_the_minimum(gradient):
    """reference=true: no gradient from a sample at the minimum, either way."""
    network = _network("disttempnet", reference=True)
    with torch.no_grad():
        network.linear_1.bias.fill_(-1e3)
    network(_features(), None).backward(torch.full((B,), gradient, dtype=torch.float64))
    assert all((parameter.grad == 0).all() for parameter in network.parameters())


def test_a_sample_at_the_minimum_may_come_back():
    """Descent on a loss that wants a higher temperature raises it out of the minimum."""
    network, features = _network("disttempnet"), _features()
    with torch.no_grad():
        network.linear_1.bias.fill_(-0.5)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    for _ in range(20):
        optimizer.zero_grad()
        (-network(features, None)).mean().backward()
        optimizer.step()
    assert (network(features, None) > network.config.min).all()


# Prototypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_prototypes_start_as_the_first_rows(head):
    """As they came; the network knows that it has them, and saves it."""
    network, rows = TempNet(D, _config(head), rho=RHO, reference=False), 3 * torch.randn(M + 2, D)
    assert not network.initialised
    network.set_prototypes(rows)
    torch.testing.assert_close(network.prototypes.detach(), rows[:M])
    again = TempNet(D, _config(head), rho=RHO, reference=False)
    again.load_state_dict(network.state_dict())
    assert again.initialised


def test_too_small_a_batch_is_refused():
    """The error says what was given, what is needed, and which key to change."""
    network = TempNet(D, _config("tempnet"), rho=RHO, reference=False)
    with pytest.raises(ValueError, match=f"prototypes={M} are taken from the first global batch, which has {M - 1}"):
        network.set_prototypes(torch.randn(M - 1, D))
    assert not network.initialised


@pytest.mark.parametrize(("head", "keeps"), [("tempnet", False), ("disttempnet", True)])
def test_published_disttempnet_keeps_random_prototypes(head, keeps):
    """reference=true: its code never fills them in; TempNet's does."""
    assert TempNet(D, _config(head), rho=RHO, reference=True).initialised == keeps


# Dropout --------------------------------------------------------------------------------------------------------------


def _mask(step: int, p: float = 0.25, rows: int = 2000) -> Tensor:
    return dropout_mask(rows, D, p=p, step=step, device=torch.device("cpu"), dtype=torch.float64)


@pytest.mark.parametrize("p", [0.25, 0.5, 0.9])
def test_mask_keeps_the_mean(p):
    """Entries are 0, or 1 / (1 - p) with probability 1 - p; the bound is five standard deviations."""
    mask = _mask(3, p)
    assert set(mask.unique().tolist()) == {0.0, 1 / (1 - p)}
    assert abs(mask.mean() - 1) < 5 * math.sqrt(p / (1 - p) / mask.numel())


def test_mask_is_a_function_of_the_step():
    """The same step gives the same one, another step another one; no other random number is moved by it."""
    state = torch.get_rng_state()
    assert torch.equal(_mask(3), _mask(3))
    agreement = (_mask(3) == _mask(4)).double().mean()
    assert abs(agreement - (0.75**2 + 0.25**2)) < 0.05  # as of two independent masks
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("head", HEADS)
def test_dropout_leaves_out_hidden_units(head):
    """A unit that is dropped has no say, whatever its weights; a mask of ones is no dropout."""
    network, features = _network(head), _features()
    torch.testing.assert_close(network(features, torch.ones(B, D, dtype=torch.float64)), network(features, None))
    keep = torch.ones(B, D, dtype=torch.float64)
    keep[:, 2] = 0
    before = network(features, keep)
    with torch.no_grad():
        network.proj.bias[2] += 5.0
    torch.testing.assert_close(network(features, keep), before)


# The reference's numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_temperatures_are_those_of_the_reference(head, golden_root):
    """Of every step, with the parameters that the reference had then."""
    paths = sorted(golden_root.glob(f"{head}_*.safetensors"))
    if not paths:
        pytest.skip(f"no golden file of {head}")
    for path in paths:
        hyper, golden = json.loads(path.with_suffix(".json").read_text())["hyper"], load_file(path)
        parameters = {key.removeprefix("in.param."): v for key, v in golden.items() if key.startswith("in.param.")}
        for k in range(len(hyper["epochs_of_steps"])):
            _check_step(head, hyper, parameters, _of_step(golden, k))
            parameters = {name: _of_step(golden, k)[f"param_after.{name}"] for name in parameters}


def _of_step(golden: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """The numbers of one step; of several ranks the first, which has the same networks as the others."""
    numbers = {key.removeprefix(f"step{k}."): v for key, v in golden.items() if key.startswith(f"step{k}.")}
    return {key.removeprefix("rank0.").removeprefix("ddp."): v for key, v in sorted(numbers.items(), reverse=True)}


def _check_step(head: str, hyper: dict, parameters: dict[str, Tensor], numbers: dict[str, Tensor]) -> None:
    ends = {name: hyper[f"tau_{name}"] for name in ("min", "max") if f"tau_{name}" in hyper}
    for tower in ("image", "text"):
        own = {n.removeprefix(f"{tower}_temp_gen."): v for n, v in parameters.items() if n.startswith(tower)}
        config = _config(head, **ends).model_copy(update={"prototypes": len(own["prototypes"])})
        features = numbers[f"in.{tower}"]
        network = TempNet(features.shape[1], config, rho=hyper["rho"], reference=True).to(features.dtype)
        network.load_state_dict({**own, "initialised": torch.tensor(True)})
        single = features.dtype == torch.float32  # the golden README's tolerances
        tolerance = {"rtol": 1e-3, "atol": 1e-6} if single else {"rtol": 1e-8, "atol": 1e-10}
        torch.testing.assert_close(network(features, None).detach(), numbers[f"out.tau_{tower}"], **tolerance)
