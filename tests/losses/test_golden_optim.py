"""Golden files of optimizers, of schedules, and of whole training runs on a toy student."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kd_accel import distributed
from kd_accel.config import ObjectiveConfig, OptimConfig
from kd_accel.objective import Objective
from kd_accel.optim import build_optimizer, learning_rates
from kd_accel.schedules import Progress, value_at
from kd_accel.schema import validate
from kd_accel.terms import GlobalContrastive
from kd_accel.types import TeacherSpec

sys.path.insert(0, str(Path(__file__).parent))  # pytest does not, in its import mode
from golden_files import TOLERANCE, files_of, over_ranks

TOWERS = ("image", "text")
PREFIXES = ("lamb", "schedules", "e2e")


def _about(path: Path) -> tuple[dict, dict[str, Tensor]]:
    return json.loads(path.with_suffix(".json").read_text())["hyper"], load_file(path)


def _close(actual: list[float], expected: Tensor) -> None:
    torch.testing.assert_close(torch.tensor(actual, dtype=torch.float64), expected.double(), **TOLERANCE[torch.float64])


class _Parameters(nn.Module):
    """A student that is nothing but its parameters."""

    def __init__(self, values: list[Tensor]):
        super().__init__()
        self.values = nn.ParameterList(nn.Parameter(value.clone()) for value in values)


@pytest.mark.parametrize("path", files_of("lamb"))
def test_lamb(path):
    """Every parameter after every step."""
    hyper, numbers = _about(path)
    student = _Parameters([numbers[f"in.p{i}"] for i in range(sum(key.startswith("in.p") for key in numbers))])
    config = {"optimizer": "lamb", "lr": hyper["lr"], "betas": hyper["betas"], "eps": hyper["eps"], "steps": 1}
    config["weight_decay"] = hyper["weight_decay_for_ndim>=2"]
    optimizer = build_optimizer(student, validate(OptimConfig, config))
    for k in range(sum(key.endswith(".in.grad0") for key in numbers)):
        for i, parameter in enumerate(student.values):
            parameter.grad = numbers[f"step{k}.in.grad{i}"]
        optimizer.step()
        for i, parameter in enumerate(student.values):
            torch.testing.assert_close(parameter.detach(), numbers[f"step{k}.p{i}"], **TOLERANCE[parameter.dtype])


@pytest.mark.parametrize("path", files_of("schedules"))
@pytest.mark.parametrize("schedule", ["cosine", "const", "const_cooldown"])
def test_learning_rates(path, schedule):
    """The towers' learning rate at every step."""
    hyper, numbers = _about(path)
    ours = {"cosine": "cosine", "const": "constant", "const_cooldown": "constant_cooldown"}[schedule]
    values = {"lr": hyper["base"], "warmup_steps": hyper["warmup"], "steps": hyper["total"], "schedule": ours}
    if schedule == "const_cooldown":
        values |= {"cooldown_steps": hyper["cooldown"], "cooldown_power": hyper["power"], "min_lr": hyper["cd_end"]}
    elif schedule == "cosine":
        values["min_lr"] = hyper["lr_min"]
    config = validate(OptimConfig, values)
    steps = range(hyper["total"])
    _close([learning_rates(config, Progress(step), total_steps=len(steps))[0] for step in steps], numbers[schedule])


@pytest.mark.parametrize("path", files_of("schedules"))
def test_temperature_rate_steps_below_the_threshold(path):
    """FastCLIP's lr_tau by the temperature of the moment."""
    hyper, numbers = _about(path)
    step_below = {"kind": "step_below", "value": hyper["lr_tau"], "threshold": 0.03, "ratio": 1 / 3}
    config = validate(OptimConfig, {"lr": 1.0, "steps": 1, "temperature_lr": step_below})
    rates = [value_at(config.temperature_lr, Progress(temperature=tau)) for tau in numbers["step_thresh.tau"].tolist()]
    _close(rates, numbers["step_thresh.lr_tau"])


@pytest.mark.parametrize("path", files_of("schedules"))
def test_gamma(path):
    """gamma of every epoch; 1 in the first one."""
    hyper, numbers = _about(path)
    for i, (kind, least, epochs) in enumerate(hyper["gammas"]):
        cosine = {"kind": "cosine", "start": 1.0, "end": least, "epochs": epochs}
        term = validate(GlobalContrastive, {"gamma": cosine if kind == "cosine" else least})
        epochs_seen = range(len(numbers[f"gamma{i}"]))
        ours = [1.0 if epoch == 0 else value_at(term.gamma, Progress(epoch=epoch)) for epoch in epochs_seen]
        _close(ours, numbers[f"gamma{i}"])


@pytest.mark.parametrize("path", files_of("schedules"))
def test_rate_of_tempnet(path):
    """The default of a temperature network, 3e-5 * 0.9 ** epoch."""
    _, numbers = _about(path)
    lr = GlobalContrastive().network.lr
    _close([value_at(lr, Progress(epoch=epoch)) for epoch in range(len(numbers["tempnet_lr"]))], numbers["tempnet_lr"])


class _Toy(nn.Module):
    """A linear layer per tower, as the files have it: x @ weight + bias."""

    def __init__(self, numbers: dict[str, Tensor]):
        super().__init__()
        self.names = sorted(key.removeprefix("in.param.") for key in numbers if key.startswith("in.param."))
        for name in self.names:
            self.register_parameter(name.replace(".", "_"), nn.Parameter(numbers[f"in.param.{name}"].clone()))

    def forward(self, numbers: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        return {
            tower: numbers[f"in.x_{tower}"][rows] @ getattr(self, f"{tower}_weight") + getattr(self, f"{tower}_bias")
            for tower in TOWERS
        }


def end_to_end(path: Path) -> None:
    """Every step of a file on as many ranks as there are: losses, gradients, parameters, and what is remembered."""
    hyper, numbers = _about(path)
    student, objective = _Toy(numbers), _objective(hyper, numbers)
    values = {
        "lr": hyper["lr"],
        "min_lr": hyper["lr_min"],
        "warmup_steps": hyper["warmup"],
        "weight_decay": hyper["wd"],
    }
    values |= {"betas": (hyper["beta1"], hyper["beta2"]), "eps": hyper["adam_eps"], "steps": hyper["total_steps"]}
    config = validate(OptimConfig, {**values, "optimizer": hyper["optimizer"]})
    optimizer = build_optimizer(student, config)
    for k, epoch in enumerate(hyper["epochs_of_steps"]):
        expected = over_ranks({n.removeprefix(f"step{k}."): v for n, v in numbers.items() if n.startswith(f"step{k}.")})
        progress = Progress(k, float(epoch), temperature=objective.temperature)
        lr, _ = learning_rates(config, progress, total_steps=hyper["total_steps"])
        _close([lr], expected["lr"].reshape(1))
        _train_step(student, objective, optimizer, numbers, expected, progress, lr)
        for name, tensor in _after(student, objective).items():
            torch.testing.assert_close(
                tensor, expected[name], **TOLERANCE[torch.float64], msg=f"step{k}.{name} differs"
            )


def _train_step(student, objective, optimizer, numbers, expected, progress, lr) -> None:
    mine = expected["in.idx"].chunk(distributed.world_size())[distributed.rank()]
    features = student(numbers, mine)
    teachers = {"teacher": {tower: numbers[f"in.t_{tower}"][mine] for tower in TOWERS}}
    outcome = objective(features, teachers, progress, ids=mine)
    optimizer.zero_grad()
    torch.autograd.backward([features[n] for n in outcome.gradients], list(outcome.gradients.values()))
    summed = distributed.sum_over_ranks([p.grad for p in student.parameters()])
    for parameter, gradient in zip(student.parameters(), summed, strict=True):
        parameter.grad = gradient
    tolerance = TOLERANCE[torch.float64]
    torch.testing.assert_close(outcome.metrics["loss/gcl"], expected["out.contrastive_mean"], **tolerance)
    distill = outcome.loss - outcome.metrics["loss/gcl"]
    torch.testing.assert_close(distill, expected["out.distill_mean"], **tolerance)
    torch.testing.assert_close(objective.log_scale.grad, expected["grad.log_scale"], **tolerance)
    for name in student.names:
        actual = student.get_parameter(name.replace(".", "_")).grad
        torch.testing.assert_close(actual, expected[f"grad.{name}"], **tolerance)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    objective.step(progress, lr=lr, temperature_lr=expected["lr_tau"].item())


def _after(student: _Toy, objective: Objective) -> dict[str, Tensor]:
    memory = objective.recall["gcl"].memory
    named = {f"param_after.{name}": student.get_parameter(name.replace(".", "_")).detach() for name in student.names}
    named["param_after.log_scale"] = torch.tensor(objective.log_logit_scale, dtype=torch.float64)
    return named | {"state.u_im": memory.log_u_image.exp(), "state.u_tt": memory.log_u_text.exp()}


def _objective(hyper: dict, numbers: dict[str, Tensor]) -> Objective:
    """FastCLIP-v3 as published, with the distillation of hyper.loss_type."""
    gamma = {"kind": "cosine", "start": 1.0, "end": hyper["gamma"], "epochs": hyper["gamma_decay_epochs"]}
    gcl = {"kind": "global_contrastive", "variant": "v3", "rho": hyper["rho"], "eps": hyper["eps"], "gamma": gamma}
    temperature = {"init": hyper["tau_init"], "min": 0.01}
    terms = {"gcl": {**gcl, "reference": True}, **_distillation(hyper)}
    objective = Objective(
        validate(ObjectiveConfig, {"terms": terms, "temperature": temperature}),
        teachers={"teacher": TeacherSpec(numbers["in.t_image"].shape[1], math.exp(hyper["t_log_scale"]))},
        num_ids=hyper["data_size"],
        betas=(hyper["beta1"], hyper["beta2"]),
        eps=hyper["adam_eps"],
    ).double()
    with torch.no_grad():
        objective.log_scale.fill_(-math.log(hyper["tau_init"]))
    return objective


def _distillation(hyper: dict) -> dict[str, dict]:
    confidence = False if hyper["dist_coeff"] == "const" else hyper["dist_coeff"]
    kinds = {
        "MSE": {"kind": "feature_mse", "reduction": "sum", "weight": 2000},
        "KL": {"kind": "logit_kl"},
        "ICL": {"kind": "interactive_contrastive"},
    }
    return {name: {**kinds[name], "confidence": confidence} for name in hyper["loss_type"].split("_")[1:]}


@pytest.mark.parametrize("path", files_of("e2e"))
def test_end_to_end(path):
    """On one rank; tests/distributed/test_objective.py runs the same on two."""
    end_to_end(path)
