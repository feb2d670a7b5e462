"""Golden files of several steps: FastCLIP, SogCLR, iSogCLR, TempNet, DistTempNet; replayed through the Objective.

Every step compares loss, gradients, what is remembered of each sample, and what the optimizers made of it. b rows of
this rank, G rows of all ranks, N sample ids.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from golden_files import TOLERANCE, dtypes_of, files_of, over_ranks
from safetensors.torch import load_file
from torch import Tensor

from kd_accel.config import ObjectiveConfig
from kd_accel.losses import contrastive, global_contrastive
from kd_accel.objective import Objective
from kd_accel.schedules import Progress, value_at
from kd_accel.schema import validate

FASTCLIP = ("fastclip_v0", "fastclip_v1", "fastclip_v2", "fastclip_v3")
TEMPNETS = ("sogclr", "isogclr", "tempnet", "disttempnet_v1")
PREFIXES = (*FASTCLIP, *TEMPNETS)
TABLES = {"image": ("im", "I"), "text": ("tt", "T")}  # how the two families call a tower's tables
NETWORKS = {"image": "image_temp_gen", "text": "text_temp_gen"}
ADAM = {"m": "m_grad_tau", "v": "v_grad_tau"}


class StepFile:
    """One file: its hyper-parameters, and the numbers of each step with those of W ranks made one."""

    def __init__(self, path: Path, dtype: torch.dtype):
        self.prefix, self.dtype = path.name.split("__")[0], dtype
        about = json.loads(path.with_suffix(".json").read_text())
        self.hyper, self.world_size = about["hyper"], about["world_size"]
        self.all = {k: v.to(dtype) if v.is_floating_point() else v for k, v in load_file(path).items()}
        self.epochs = self.hyper["epochs_of_steps"]
        self.parameters = {k.removeprefix("in.param."): v for k, v in self.all.items() if k.startswith("in.param.")}
        self.seen: set[str] = set()

    def step(self, k: int) -> dict[str, Tensor]:
        start = f"step{k}."
        return over_ranks({key.removeprefix(start): v for key, v in self.all.items() if key.startswith(start)})

    @property
    def feature_share(self) -> float:
        """What DDP's mean leaves of the feature gradient: TempNet's gather keeps a rank's own slice only."""
        return 1 / self.world_size if self.prefix in TEMPNETS else 1.0

    def unseen(self) -> set[str]:
        """Outputs that no assert_close has compared."""
        inputs = re.compile(r"step\d+\.(in\..*|lr_tau|gamma)")
        keys = {f"step{k}.{key}" for k in range(len(self.epochs)) for key in self.step(k)}
        return {key for key in keys - self.seen if not inputs.fullmatch(key)}

    def assert_close(self, actual: Tensor, expected: Tensor, key: str) -> None:
        self.seen.add(key)
        tolerance = dict(TOLERANCE[self.dtype])
        if self.dtype == torch.float32:
            tolerance["atol"] *= max(1.0, expected.abs().max().item())
        shape = expected.shape
        torch.testing.assert_close(
            actual.reshape(shape), expected, **tolerance, msg=lambda text: f"{self.prefix} {key}: {text}"
        )


def build(file: StepFile, *, reference: bool, chunk_rows: int) -> Objective:
    """The Objective with the file's term and parameters."""
    hyper, first = file.hyper, file.step(0)
    tau = hyper.get("tau_init", hyper.get("temperature", 0.07))
    log_scale = first.get("log_scale_before", torch.tensor(-math.log(tau), dtype=torch.float64))
    temperature = {"init": math.exp(-log_scale.item()), "min": min(0.01, math.exp(-log_scale.item()))}
    temperature["learnable"] = file.prefix in ("fastclip_v0", "fastclip_v3")
    terms = {"gcl": {"kind": "global_contrastive", "reference": reference, **_term(file)}}
    config = validate(ObjectiveConfig, {"terms": terms, "chunk_rows": chunk_rows, "temperature": temperature})
    widths = {tower: first[f"in.{tower}"].shape[1] for tower in TABLES}
    betas = hyper.get("beta1", 0.9), hyper.get("beta2", 0.999)
    objective = Objective(
        config, widths=widths, num_ids=hyper["data_size"], betas=betas, eps=hyper.get("adam_eps", 1e-8)
    ).to(file.dtype)
    with torch.no_grad():
        objective.log_scale.copy_(log_scale)
        for name, column in objective.recall["gcl"].memory.named_buffers():
            if name.startswith("tau_"):
                column.fill_(tau)  # in the file's precision
        for tower, network in objective.recall["gcl"].networks.items():
            given = {
                n.removeprefix(f"{NETWORKS[tower]}."): v for n, v in file.parameters.items() if NETWORKS[tower] in n
            }
            for name, parameter in network.named_parameters():
                parameter.copy_(given[name])
            network.initialised.fill_(True)
    return objective


def _term(file: StepFile) -> dict:
    """The term's options, of the file's hyper-parameters."""
    hyper = file.hyper
    options = {"rho": hyper.get("rho", 0.0), "gamma": _gamma(hyper), "eps": hyper.get("eps", 1e-14)}
    match file.prefix:
        case "fastclip_v2":
            lr = hyper["lr_tau"]
            return {**options, "variant": "v2", "individual": {"init": hyper["tau_init"], "lr": lr}}
        case "isogclr":
            names = {"init": "tau_init", "min": "tau_min", "max": "tau_max", "lr": "eta"}
            return {**options, "variant": "isogclr", "individual": {ours: hyper[name] for ours, name in names.items()}}
        case "tempnet" | "disttempnet_v1":
            network = {"head": file.prefix.removesuffix("_v1"), "prototypes": hyper["M"], "dropout": 0.0}
            network |= {"min": hyper["tau_min"]} | ({"max": hyper["tau_max"]} if "tau_max" in hyper else {})
            lr = {"kind": "step_every", "value": hyper["lr_temp_net"], "ratio": 0.9, "epochs": 1}
            network["lr"] = lr
            return {**options, "variant": "isogclr", "temperature": "network", "network": network}
        case "sogclr":
            return {**options, "variant": "sogclr"}
    return {**options, "variant": file.prefix.removeprefix("fastclip_"), "multiply_tau": hyper["multiply_tau"]}


def _gamma(hyper: dict) -> float | dict:
    if hyper.get("gamma_schedule", "cosine" if "gamma_decay_epochs" in hyper else "constant") == "constant":
        return hyper["gamma"]
    return {"kind": "cosine", "start": 1.0, "end": hyper["gamma"], "epochs": hyper["gamma_decay_epochs"]}


def replay(file: StepFile, *, chunk_rows: int, rows: slice = slice(None)) -> None:
    """Every step of the file through an Objective that sees `rows` of each global batch."""
    objective = build(file, reference=True, chunk_rows=chunk_rows)
    exact = build(file, reference=False, chunk_rows=chunk_rows)
    for k, epoch in enumerate(file.epochs):
        numbers = file.step(k)
        progress = Progress(step=k, epoch=float(epoch), temperature=objective.temperature)
        _check_before(file, objective, numbers, k, progress)
        student = {tower: numbers[f"in.{tower}"][rows] for tower in TABLES}
        _copy_shared(objective, exact)
        outcome = objective(student, {}, progress, ids=numbers["in.idx"][rows])
        file.assert_close(outcome.loss, numbers["out.loss"], f"step{k}.out.loss")
        if "out.temp_loss" in numbers:  # ours is the sum of the two parts
            file.assert_close(
                outcome.loss - numbers["out.temp_loss"], numbers["out.clip_loss"], f"step{k}.out.clip_loss"
            )
            file.assert_close(
                outcome.loss - numbers["out.clip_loss"], numbers["out.temp_loss"], f"step{k}.out.temp_loss"
            )
        for tower in TABLES:
            actual = outcome.gradients[tower] * file.feature_share
            file.assert_close(actual, _tangent(numbers, tower)[rows], f"step{k}.grad.{tower}")
        if "derived.grad.log_scale_exact" in numbers:
            exact(student, {}, progress, ids=numbers["in.idx"][rows])
            key = "derived.grad.log_scale_exact"
            file.assert_close(exact.log_scale.grad, numbers[key], f"step{k}.{key}")
        _check_parameters(file, objective, numbers, k, ".grad")
        objective.step(progress, lr=0.0, temperature_lr=_temperature_lr(numbers))
        _check_parameters(file, objective, numbers, k, ".param_after")
        _check_memory(file, objective, numbers, k)


@torch.no_grad()
def _copy_shared(objective: Objective, other: Objective) -> None:
    """What the objective of another `reference` has as well; the bound of individual temperatures it has not."""
    names, columns = other.state_dict().keys(), objective.by_id()
    other.load_state({name: tensor for name, tensor in objective.state().items() if name in names})
    for name, column in other.by_id().items():
        column.copy_(columns[name])


def _temperature_lr(numbers: dict[str, Tensor]) -> float:
    return numbers["lr_tau"].item() if "lr_tau" in numbers else 0.0


def _tangent(numbers: dict[str, Tensor], tower: str) -> Tensor:
    """The reference's gradient by unit features as one by raw features: without its part along them."""
    gradient, unit = numbers[f"grad.{tower}"], numbers[f"in.{tower}"]
    return gradient - (gradient * unit).sum(1, keepdim=True) * unit


def _check_before(file: StepFile, objective: Objective, numbers: dict, k: int, progress: Progress) -> None:
    """The numbers that go into the step: gamma, the temperatures, g."""
    term = objective.config.terms["gcl"]
    if "gamma" in numbers:
        gamma = 1.0 if progress.epoch == 0 else value_at(term.gamma, progress)
        file.assert_close(torch.tensor(gamma, dtype=file.dtype), numbers["gamma"], f"step{k}.gamma")
    if "log_scale_before" in numbers:
        actual = torch.tensor(objective.log_logit_scale, dtype=file.dtype)
        file.assert_close(actual, numbers["log_scale_before"], f"step{k}.log_scale_before")
    for tower, tau in _temperatures(objective, numbers).items():
        short = TABLES[tower][0]
        if f"out.tau_{tower}" in numbers:
            file.assert_close(tau, numbers[f"out.tau_{tower}"], f"step{k}.out.tau_{tower}")
        if f"out.g_{short}" in numbers:
            log_g = _log_inner(numbers, tower, tau)
            bound = numbers.get(f"state.bound_{short}", torch.zeros(file.hyper["data_size"], dtype=file.dtype))
            relative = (log_g - bound[numbers["in.idx"]]).exp()
            file.assert_close(relative, numbers[f"out.g_{short}"], f"step{k}.out.g_{short}")


def _temperatures(objective: Objective, numbers: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the step will divide by, [G] per tower."""
    recall, ids = objective.recall["gcl"], numbers["in.idx"]
    match recall.term.temperature:
        case "individual":
            return {tower: recall.memory.read(ids)[f"tau_{tower}"] for tower in TABLES}
        case "network":
            return {tower: recall.networks[tower](numbers[f"in.{tower}"], None).detach() for tower in TABLES}
    tau = torch.full(ids.shape, objective.temperature, dtype=numbers["in.image"].dtype)
    return dict.fromkeys(TABLES, tau)


def _log_inner(numbers: dict[str, Tensor], tower: str, tau: Tensor) -> Tensor:
    other = "text" if tower == "image" else "image"
    logits = contrastive.similarity_logits(numbers[f"in.{tower}"], numbers[f"in.{other}"], (1 / tau)[:, None])
    return global_contrastive.log_inner(logits, 0)


def _check_parameters(file: StepFile, objective: Objective, numbers: dict, k: int, when: str) -> None:
    """Gradients (".grad") and values after the optimizer's step (".param_after") of scale and networks."""
    names = {".grad": ("grad.log_scale_ddp", "grad.log_scale_rank"), ".param_after": ("log_scale_after",)}[when]
    for name in names:
        if name in numbers:  # a rank's own part, averaged over the ranks, is the whole
            after = torch.tensor(objective.log_logit_scale, dtype=file.dtype)
            actual = objective.log_scale.grad if when == ".grad" else after
            file.assert_close(actual, numbers[name], f"step{k}.{name}")
    for tower, network in objective.recall["gcl"].networks.items():
        for own, parameter in network.named_parameters():
            key = f"{when[1:]}.{NETWORKS[tower]}.{own}"
            file.assert_close(parameter.grad if when == ".grad" else parameter.detach(), numbers[key], f"step{k}.{key}")


def _check_memory(file: StepFile, objective: Objective, numbers: dict, k: int) -> None:
    """The whole tables [N] after the step."""
    memory = objective.recall["gcl"].memory.read(torch.arange(file.hyper["data_size"]))
    for tower, (short, letter) in TABLES.items():
        log_u = memory[f"log_u_{tower}"]
        if file.prefix in TEMPNETS:
            # Relative to exp(bound), and where ours is a mean over the G - 1 others, iSogCLR's is their sum.
            total = 0.0 if file.prefix == "sogclr" else math.log(len(numbers["in.idx"]) - 1)
            relative = (log_u + total - numbers[f"state.b_{letter}"]).exp()
            file.assert_close(relative, numbers[f"state.s_{letter}"], f"step{k}.state.s_{letter}")
            tables = {"bound": f"b_{letter}", "tau": f"tau_{letter}", "velocity": f"u_{letter}"}
        else:
            relative = (log_u - memory.get(f"bound_{tower}", 0.0)).exp()
            file.assert_close(relative, numbers[f"state.u_{short}"], f"step{k}.state.u_{short}")
            tables = {"bound": f"bound_{short}", "tau": f"tau_{short}"}
            tables |= {ours: f"{theirs}_{short}" for ours, theirs in ADAM.items()}
        for ours, theirs in tables.items():
            if f"{ours}_{tower}" in memory:
                file.assert_close(memory[f"{ours}_{tower}"], numbers[f"state.{theirs}"], f"step{k}.state.{theirs}")


def cases() -> Iterator[tuple[Path, torch.dtype]]:
    """(file, dtype): every float64 file in float32 as well."""
    for case in files_of(*PREFIXES):
        if case.values[0] is not None:
            yield from ((case.values[0], dtype) for dtype in dtypes_of(case.values[0]))
