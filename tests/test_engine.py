"""The engine in one process: what it refuses, what it keeps exact, and that its state by name is the whole state."""

from __future__ import annotations

import itertools
import json

import pytest
import tiny
import torch
from optimizer_state import optimizer_state

from kd_accel.config import TrainConfig
from kd_accel.engine import Engine
from kd_accel.held import WEIGHT, HostMemory, whole
from kd_accel.launch import end_accelerator, start_accelerator
from kd_accel.models.image import images_at_once
from kd_accel.models.student import Student
from kd_accel.models.teacher import Teacher
from kd_accel.optim import build_optimizer
from kd_accel.schema import validate
from kd_accel.types import Batch


def config_of(teacher, precision: str, optimizer: str = "adamw") -> TrainConfig:
    return validate(
        TrainConfig,
        {
            "name": "engine",
            "precision": precision,
            "data": {"shards": "none", "batch_size": 4},
            "student": {"arch": tiny.arch(22, 7), "projector": "linear"},
            "teacher": {"path": str(teacher)},
            "objective": {"terms": {"feature": {"kind": "feature_mse"}}},
            "optim": {"lr": 1e-2, "steps": 10, "optimizer": optimizer},
        },
    )


@pytest.fixture
def launched(monkeypatch, free_port):
    """A function that sets the environment as the launcher does for `stage` (0: no DeepSpeed) in one process."""

    def launch(stage: int) -> None:
        values = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port}
        values |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage} if stage else {}
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    yield launch
    end_accelerator()


def start(
    config: TrainConfig, *, grad_clip_norm: float = 1.0, read: set[str] | None = None
) -> tuple[Engine, dict[str, torch.Tensor]]:
    """The engine, and the weights its student had before; `read`: the rest is frozen."""
    accelerator = start_accelerator(precision=config.precision, batch_size=4, grad_clip_norm=grad_clip_norm)
    torch.manual_seed(1)
    student, teachers = Student(config.student, {"teacher": 12}), {"teacher": Teacher(config.teacher)}
    if read is not None:
        student.freeze_all_but(read)
    weights = {name: p.detach().clone() for name, p in student.named_parameters()}
    optimizer = build_optimizer(student, config.optim)
    return Engine(accelerator, student, teachers, optimizer=optimizer, config=config), weights


def batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    image = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)
    text = torch.randint(1, 49408, (4, 12), generator=generator)
    return Batch(torch.arange(4), image, {"student": text, "teacher": text})


def step(engine: Engine, number: int) -> None:
    features, teachers = engine.forward([batch(number)])
    gradients = {name: f.detach().float() - 0.1 for name, f in features.items()}
    engine.backward(gradients)
    applied, norm = engine.step(1e-2)
    assert applied
    assert norm > 0
    assert not any(target.requires_grad for targets in teachers.values() for target in targets.values())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_masters_start_from_the_exact_weights(launched, tiny_teacher, stage, precision):
    """The fp32 weights behind a bf16 engine are those the student was built with, not their rounding to bf16."""
    launched(stage)
    engine, before = start(config_of(tiny_teacher, precision))
    after = engine.masters.weights()
    for name, weight in before.items():
        assert torch.equal(after[name], weight), name


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_cpu_asks_its_teacher_for_some_images_at_a_time(launched, tiny_teacher, stage):
    """Under ZeRO-3 for all: its weights would be gathered as many times."""
    launched(stage)
    engine, _ = start(config_of(tiny_teacher, "fp32"))
    (teacher,) = (module for module in engine.module.modules() if isinstance(module, Teacher))
    assert teacher.images_at_once == (None if stage == 3 else images_at_once(torch.device("cpu")))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_bucket_is_no_larger_than_the_student(launched, tiny_teacher, stage):
    """DeepSpeed allocates it whole: two gigabytes of its own default, whatever the model's size."""
    launched(stage)
    engine, weights = start(config_of(tiny_teacher, "fp32"))
    step(engine, 0)
    assert engine.module.optimizer.reduce_bucket_size == sum(weight.numel() for weight in weights.values())


def test_a_smaller_bucket_of_the_launch_file_stays(launched, tiny_teacher, tmp_path, monkeypatch):
    launched(2)
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    engine, _ = start(config_of(tiny_teacher, "fp32"))
    step(engine, 0)
    assert engine.module.optimizer.reduce_bucket_size == 1000


@pytest.mark.parametrize(
    ("precision", "stage", "optimizer"),
    list(itertools.product(("fp32", "bf16"), (0, 1, 2, 3), ("adamw", "lamb"))),
)
def test_state_by_name_is_the_whole_state(launched, tiny_teacher, precision, stage, optimizer):
    """Two steps, save, a fresh engine, load, a third step: bit for bit the weights and moments of three steps."""
    launched(stage)
    config = config_of(tiny_teacher, precision, optimizer=optimizer)
    engine, _ = start(config)
    step(engine, 0), step(engine, 1)
    weights, memory = engine.masters.weights(), optimizer_state(engine)
    assert memory.step == 2
    held = whole(engine.masters.held(HostMemory()))[WEIGHT]
    assert held.keys() == weights.keys()
    assert all(torch.equal(held[name], weight) for name, weight in weights.items())
    step(engine, 2)
    straight, straight_memory = engine.masters.weights(), optimizer_state(engine)
    end_accelerator()

    launched(stage)
    engine, _ = start(config)
    step(engine, 7)  # a state that must be overwritten
    engine.masters.load_weights(weights)
    engine.masters.load_optimizer_state(memory)
    step(engine, 2)
    resumed, resumed_memory = engine.masters.weights(), optimizer_state(engine)
    assert resumed_memory.step == 3
    for name in straight:
        assert torch.equal(resumed[name], straight[name]), name
    for key, moments in straight_memory.moments.items():
        for name, moment in moments.items():
            assert torch.equal(resumed_memory.moments[key][name], moment), f"{key} {name}"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("precision", "optimizer"), [("fp32", "adamw"), ("bf16", "adamw"), ("bf16", "lamb")])
def test_frozen_weights_stay_exact(launched, tiny_teacher, stage, precision, optimizer):
    """A tower that nothing reads: not decayed, no moments, bit for bit the weights it had, and loaded as any other."""
    launched(stage)
    config = config_of(tiny_teacher, precision, optimizer)
    engine, before = start(config, read={"projected_image"})
    step(engine, 0), step(engine, 1)
    weights, memory = engine.masters.weights(), optimizer_state(engine)
    trained = {name for name in before if "visual" in name or name.startswith("projector.image")}
    assert {name for name in before if torch.equal(weights[name], before[name])} == before.keys() - trained
    assert memory.moments["exp_avg"].keys() == trained
    end_accelerator()

    launched(stage)
    engine, _ = start(config, read={"projected_image"})
    weights["clip.text_projection"] = torch.rand_like(weights["clip.text_projection"])
    weights["projector.text.weight"].zero_()
    engine.masters.load_weights(weights)
    engine.masters.load_optimizer_state(memory)
    after = engine.masters.weights()
    assert all(torch.equal(after[name], weight) for name, weight in weights.items())
    engine.student.unread.clear()  # a tower that no term reads is not run
    features, _ = engine.forward([batch(3)])
    bias = weights["projector.text.bias"].expand_as(features["projected_text"])
    torch.testing.assert_close(features["projected_text"].float(), bias, rtol=2**-8, atol=0)  # bf16's last place
    step(engine, 2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_non_finite_gradient_skips_the_step(launched, tiny_teacher, stage):
    """A nan in one feature's gradient: not applied, weights as before, and the next step works."""
    launched(stage)
    engine, before = start(config_of(tiny_teacher, "fp32"))
    features, _ = engine.forward([batch(0)])
    gradients = {name: torch.full_like(f, float("nan")) for name, f in features.items()}
    engine.backward(gradients)
    applied, _ = engine.step(1e-2)
    assert not applied
    after = engine.masters.weights()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert optimizer_state(engine).step == 0
    step(engine, 1)


@pytest.mark.parametrize("stage", [1, 2])
def test_teacher_takes_no_optimizer_state(launched, tiny_teacher, stage):
    """DeepSpeed's flat partitions hold the student's parameters and nothing of the teacher."""
    launched(stage)
    engine, before = start(config_of(tiny_teacher, "bf16"))
    flat = sum(p.numel() for group in engine.masters._adamw().param_groups for p in group["params"])
    trained = sum(weight.numel() for weight in before.values())
    assert trained <= flat < trained + 64  # alignment


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_moving_average_of_the_masters(launched, tiny_teacher, stage, precision):
    """By name it is decay * average + (1 - decay) * weights of the fp32 masters; a loaded one goes on."""
    launched(stage)
    config, decay = config_of(tiny_teacher, precision), 0.7
    engine, _ = start(config)
    step(engine, 0)
    engine.masters.average(decay)
    expected = {name: weights.clone() for name, weights in engine.masters.weights().items()}
    for number in (1, 2, 3):
        step(engine, number)
        if number == 3:  # another engine takes over
            weights, memory = engine.masters.weights(), optimizer_state(engine)
            end_accelerator()
            launched(stage)
            engine, _ = start(config)
            engine.masters.load_weights(weights)
            engine.masters.load_optimizer_state(memory)
        engine.masters.average(decay)
        now = engine.masters.weights()
        expected = {name: decay * expected[name] + (1 - decay) * now[name] for name in expected}
    average = optimizer_state(engine).moments["ema"]
    assert average.keys() == {name for name, _ in engine.student.named_parameters()}
    for name, values in average.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_groups_keep_their_rates(launched, tiny_teacher, stage):
    """Weight decay and learning rate of every group reach the optimizer that really steps, under each stage."""
    launched(stage)
    config = config_of(tiny_teacher, "fp32")
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"layer_decay": 0.5})})
    engine, _ = start(config)
    step(engine, 0)
    groups = {(g["name"], g["lr_scale"]): (g["lr"], g["weight_decay"]) for g in engine.masters._adamw().param_groups}
    scales = {1.0, 0.5, 0.25}  # one block per tower: above it, itself, below it
    assert groups == {
        (name, scale): (1e-2 * scale, decay) for name, decay in (("decay", 0.1), ("no_decay", 0.0)) for scale in scales
    }
