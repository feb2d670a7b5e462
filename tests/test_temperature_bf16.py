"""What the objective learns goes the same way beside a bf16 student as beside an fp32 one; a skipped step is no step.

Fifty steps of a student that is matched with its captions for the first half, which pushes the temperature against its
lower end, and with others' for the second, which pulls it back.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import tiny
import torch
from test_engine import launched  # noqa: F401  the fixture
from torch import Tensor

from kd_accel import assembly, objective
from kd_accel.config import TrainConfig
from kd_accel.engine import Engine
from kd_accel.launch import end_accelerator, start_accelerator
from kd_accel.objective import Objective
from kd_accel.optim import build_optimizer
from kd_accel.schedules import Progress
from kd_accel.schema import validate
from kd_accel.train import Trainer
from kd_accel.types import Batch

B, STEPS, TURN = 8, 50, 25
ALONE = 18  # steps of the student before: once it tells the captions apart, a lower temperature is a lower loss
LR, OWN_LR = 3e-3, 2e-3  # the towers', and that of temperature and network
TERMS = {
    "clip": {"kind": "clip"},
    "feature": {"kind": "feature_mse"},
    "tempnet": {
        "kind": "global_contrastive",
        "gamma": 0.6,
        "temperature": "network",
        "network": {"prototypes": 5, "lr": OWN_LR},
    },
}
SCALE = "log_scale"
NETWORK = [f"recall.tempnet.networks.{tower}.linear_1.weight" for tower in ("image", "text")]  # ones at first
# Shares of the way, see `apart`: what never moves is 1 away. Measured 0.02, and 0.3 where a weight's gradient is noise.
BOUNDS = {SCALE: 0.25} | dict.fromkeys(NETWORK, 0.5)
Trajectories = dict[str, Tensor]  # parameter -> its values after each step, [STEPS, size]


def config_of(teacher, precision: str) -> TrainConfig:
    return validate(
        TrainConfig,
        {
            "name": "temperature",
            "precision": precision,
            "data": {"shards": "none", "batch_size": B},
            "student": {"arch": tiny.arch(32, 16), "projector": "linear"},
            "teacher": {"path": str(teacher)},
            "objective": {"terms": TERMS, "temperature": {"init": 0.07, "min": 0.07}},
            "optim": {"lr": LR, "steps": STEPS},
        },
    )


def batch(turned: bool) -> Batch:
    """Eight plain colours with eight random captions, or each with its neighbour's."""
    generator = torch.Generator().manual_seed(5)
    color = torch.randint(0, 256, (B, 3, 1, 1), dtype=torch.uint8, generator=generator)
    text = torch.randint(1, 49408, (B, 12), generator=generator)
    text = text.roll(1, dims=0) if turned else text
    return Batch(torch.arange(B), color.expand(B, 3, 32, 32).contiguous(), {"student": text, "teacher": text})


def train(teacher, precision: str, after_step: Callable[[Objective], None] = lambda _: None) -> Trajectories:
    """The temperature and a layer of each TempNet in STEPS steps; `after_step` may do harm."""
    config = config_of(teacher, precision)
    accelerator = start_accelerator(precision=precision, batch_size=B, grad_clip_norm=1.0)
    torch.manual_seed(1)
    teachers = assembly.build_teachers(config)
    student = assembly.build_student(config, teachers)
    config = assembly.fit_models(config, student, teachers)
    specs = {"teacher": teachers["teacher"].spec}
    ours = Objective(config.objective, teachers=specs, widths=student.widths, num_ids=B)
    engine = Engine(accelerator, student, teachers, optimizer=build_optimizer(student, config.optim), config=config)
    engine.module.train()
    learned = dict(ours.named_parameters())
    values = {name: [] for name in (SCALE, *NETWORK)}
    for number in range(-ALONE, STEPS):
        features, targets = engine.forward([batch(number >= TURN)])
        progress = Progress(max(number, 0))
        outcome = ours(features, targets, progress, ids=torch.arange(B))
        engine.backward(outcome.gradients)
        assert engine.step(LR)[0]
        if number < 0:
            continue
        ours.step(progress, lr=LR, temperature_lr=OWN_LR)
        after_step(ours)
        for name, seen in values.items():
            seen.append(learned[name].detach().flatten().clone())
    end_accelerator()
    return {name: torch.stack(seen) for name, seen in values.items()}


def apart(ours: Trajectories, theirs: Trajectories) -> dict[str, float]:
    """Largest distance of the two ways by parameter, as a share of how far theirs leads from its first point."""
    lengths = {name: (way - way[0]).norm(dim=1).max() for name, way in theirs.items()}
    return {name: ((ours[name] - theirs[name]).norm(dim=1).max() / length).item() for name, length in lengths.items()}


def rounded(*names: str) -> Callable[[Objective], None]:
    """The fault of a parameter that lies in the bf16 engine: an update smaller than half a spacing is lost."""

    def harm(ours: Objective) -> None:
        for name, parameter in ours.named_parameters():
            if name in names:
                parameter.data = parameter.data.bfloat16().float()

    return harm


@pytest.fixture(scope="module")
def fp32(tiny_teacher) -> Trajectories:
    """Without an engine: the temperature is at its lower end at the turn, and well inside afterwards."""
    way = train(tiny_teacher, "fp32")
    end = -math.log(0.07)
    assert way[SCALE][TURN - 1] >= end
    assert way[SCALE][-1] < end - 5 * OWN_LR
    return way


def astray(ours: Trajectories, theirs: Trajectories) -> set[str]:
    """The parameters whose two ways part."""
    found = apart(ours, theirs)
    print(found)  # shown when a test fails
    return {name for name, distance in found.items() if not distance <= BOUNDS[name]}


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_bf16_goes_the_way_of_fp32(launched, tiny_teacher, fp32, stage):  # noqa: F811
    """Under autocast and in a bf16 engine, temperature and TempNets take fp32's way."""
    launched(stage)
    assert not astray(train(tiny_teacher, "bf16"), fp32)


@pytest.mark.parametrize("names", [[SCALE], NETWORK], ids=["temperature", "network"])
def test_rounding_shows(launched, tiny_teacher, fp32, names):  # noqa: F811
    """What lies in bf16 stays where it is: the check above fails, for it alone."""
    launched(1)
    assert astray(train(tiny_teacher, "bf16", rounded(*names)), fp32) == set(names)


def test_winding_up_shows(launched, tiny_teacher, fp32, monkeypatch):  # noqa: F811
    """Without the block at its end the temperature runs on beyond it, and is outside to the end: fails as well."""
    monkeypatch.setattr(objective, "block_outward", lambda gradient, *_: gradient)
    launched(1)
    way = train(tiny_teacher, "bf16")
    assert astray(way, fp32) == {SCALE}
    assert way[SCALE].min() > -math.log(0.07) > fp32[SCALE][-1]


@pytest.mark.parametrize("stage", [0, 1])
def test_skipped_step_moves_nothing(launched, tiny_teacher, train_shards, tmp_path, stage):  # noqa: F811
    """A nan in the gradient: temperature, TempNet, their Adam moments and the loss memory stay; the next step moves."""
    launched(stage)
    values = config_of(tiny_teacher, "bf16").model_dump(mode="json")
    values |= {"output_dir": str(tmp_path), "data": {"shards": str(train_shards), "batch_size": B, "num_workers": 0}}
    trainer = Trainer(validate(TrainConfig, values))
    batches, send = iter(trainer.loader), trainer.engine.backward
    for _ in range(2):
        trainer.train_step(next(batches))
    before = trainer.objective.state()

    trainer.engine.backward = lambda gradients: send({n: g * math.nan for n, g in gradients.items()})
    trainer.train_step(next(batches))
    assert (trainer.state.step, trainer.state.skipped) == (3, 1)
    torch.testing.assert_close(trainer.objective.state(), before, rtol=0, atol=0, equal_nan=True)

    trainer.engine.backward = send
    trainer.train_step(next(batches))
    after = trainer.objective.state()
    kept = {name for name in before if torch.equal(before[name].nan_to_num(), after[name].nan_to_num())}
    assert kept == {f"recall.tempnet.networks.{tower}.initialised" for tower in ("image", "text")}
    trainer.metrics.close()
