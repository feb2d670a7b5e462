"""A ResNet student's running statistics under an engine, against sums by hand; run by test_statistics.py.

statistics_worker.py ENGINE-PRECISION ...        ENGINE: ddp | zero1 | zero2 | zero3; PRECISION: fp32 | bf16
"""

import os
import sys

import tiny
import torch
from optimizer_state import optimizer_state
from torch import Tensor, nn

from kd_accel import distributed, processes
from kd_accel.config import TrainConfig
from kd_accel.engine import Engine
from kd_accel.held import WEIGHT, HostMemory, whole
from kd_accel.launch import end_accelerator, start_accelerator
from kd_accel.masters import OptimizerState
from kd_accel.models.image import encode_image
from kd_accel.models.running_stats import running_statistics
from kd_accel.models.scale import take_scale
from kd_accel.models.student import Student
from kd_accel.models.towers import construct
from kd_accel.optim import build_optimizer
from kd_accel.schema import validate
from kd_accel.types import Batch

ROWS, LR, MOMENTUM = 6, 1e-2, 0.1  # the momentum is torch's default
FIRST = 1 / 3  # of every running statistic: bf16 has no such number


def start(name: str, precision: str) -> Engine:
    stage = int(name.removeprefix("zero")) if name.startswith("zero") else 0
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true" if stage else "false"
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(stage)
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
    values = {
        "name": "statistics",
        "precision": precision,
        "data": {"shards": "none", "batch_size": ROWS},
        "student": {"arch": tiny.arch() | {"vision_cfg": vision}},
        "objective": {"terms": {"clip": {"kind": "clip"}}},
        "optim": {"lr": LR, "steps": 9},
    }
    config = validate(TrainConfig, values)
    accelerator = start_accelerator(precision=precision, batch_size=ROWS, grad_clip_norm=1.0)
    torch.manual_seed(1)
    student = Student(config.student, {})
    for tensor in running_statistics(student).values():
        tensor.fill_(FIRST)  # the number of batches becomes 0
    engine = Engine(accelerator, student, {}, optimizer=build_optimizer(student, config.optim), config=config)
    engine.module.train()
    return engine


def batch(step: int) -> Batch:
    """Other rows on every rank."""
    generator = torch.Generator().manual_seed(10 * step + distributed.rank())
    image = torch.randint(0, 256, (ROWS, 3, 32, 32), dtype=torch.uint8, generator=generator)
    text = torch.randint(1, 49408, (ROWS, 12), generator=generator)
    return Batch(torch.arange(ROWS), image, {"student": text})


def train(engine: Engine, steps: range) -> None:
    for step in steps:
        features, _ = engine.forward([batch(step)])
        generator = torch.Generator().manual_seed(step)
        engine.backward({key: torch.randn(rows.shape, generator=generator) for key, rows in features.items()})
        applied, _ = engine.step(LR)
        assert applied


def moving_averages(student: Student) -> dict[str, Tensor]:
    """This rank's running statistics in fp64, from what its BatchNorms are shown in training from here on."""
    expected: dict[str, Tensor] = {}

    def follow(name: str):
        def hook(module, inputs):
            rows = inputs[0].double().transpose(0, 1).flatten(1)  # [channels, values]
            for key, value in {"mean": rows.mean(1), "var": rows.var(1)}.items():
                key = f"{name}.running_{key}"
                before = expected.get(key, torch.full_like(value, FIRST))
                expected[key] = (1 - MOMENTUM) * before + MOMENTUM * value

        return hook

    for name, module in student.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(follow(name))
    return expected


def check_statistics(engine: Engine, expected: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    """Those collected, and from then on those of every rank, are the mean over ranks; a rank's own are others."""
    own = dict(expected)
    totals = distributed.sum_over_ranks(list(expected.values()))
    mean = {name: (total / distributed.world_size()).float() for name, total in zip(expected, totals, strict=True)}
    held = dict(engine.student.named_buffers())
    torch.testing.assert_close({name: held[name] for name in mean}, mean, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(own["clip.visual.bn1.running_mean"].float(), mean["clip.visual.bn1.running_mean"])
    if distributed.is_main():
        torch.testing.assert_close({name: weights[name] for name in mean}, mean, rtol=1e-4, atol=1e-6)
        assert all(tensor.isfinite().all() for tensor in weights.values())


def check_skipped(engine: Engine) -> None:
    """A step that is not taken leaves no trace in them, of whatever kind of sample."""
    before = {name: tensor.clone() for name, tensor in running_statistics(engine.student).items()}
    features, _ = engine.forward([batch(0)])
    assert any(not torch.equal(t, before[name]) for name, t in running_statistics(engine.student).items())
    engine.backward({key: torch.full_like(rows, torch.nan) for key, rows in features.items()})
    applied, _ = engine.step(LR)
    assert not applied
    torch.testing.assert_close(running_statistics(engine.student), before, rtol=0, atol=0)


def check_features(engine: Engine, weights: dict[str, Tensor], rounding: float) -> None:
    """In eval mode a model with the collected weights says what the student in its engine says."""
    engine.module.eval()
    with torch.no_grad():
        features, _ = engine.forward([batch(0)])
    engine.module.train()
    if distributed.is_main():
        student = engine.student
        model = construct(student.model_cfg, where="student.arch").eval()
        take_scale(model)
        model.load_state_dict(student.release_state(weights), strict=True)
        with torch.no_grad():
            said = encode_image(model, batch(0).image, student.contract.image)
        apart = (features["image"].float() - said).abs().max() / said.abs().max()
        assert apart < rounding, f"features are {apart:.3g} of their size apart"


def check_held(engine: Engine, weights: dict[str, Tensor]) -> None:
    """What ranks copy for a checkpoint is, put together, what they gather; the next copy takes the same place."""
    memory = HostMemory()
    place = engine.masters.held(memory).values.data_ptr()
    held = engine.masters.held(memory)
    assert held.values.data_ptr() == place
    state = whole(held)
    found = state.get(WEIGHT, {}) | held.untrained
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


def check(name: str, precision: str) -> None:
    engine = start(name, precision)
    expected = moving_averages(engine.student)
    train(engine, range(3))
    weights, memory = engine.masters.weights(), optimizer_state(engine)
    check_statistics(engine, expected, weights)
    # bf16 keeps 8 bits: some 40 operations err by 2^-9 each
    check_features(engine, weights, rounding=1e-4 if precision == "fp32" else 40 * 2**-9)
    check_skipped(engine)
    train(engine, range(3, 5))
    after = engine.masters.weights()
    check_held(engine, after)

    weights, moments = distributed.from_main((weights, memory.moments))
    end_accelerator()
    resumed = start(name, precision)
    resumed.masters.load_weights(weights)
    resumed.masters.load_optimizer_state(OptimizerState(step=3, moments=moments))
    train(resumed, range(3, 5))
    torch.testing.assert_close(resumed.masters.weights(), after, rtol=0, atol=0)
    end_accelerator()


def main() -> None:
    for case in sys.argv[1:]:
        print(case, flush=True)
        check(*case.split("-"))
    processes.end_process(0)


if __name__ == "__main__":
    main()
