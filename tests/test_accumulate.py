"""Accumulation in one process: two passes that see the same, teachers asked once, statistics that move once.

That gradients are those of one large batch: tests/distributed/test_parity.py.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from test_engine import batch, launched  # noqa: F401  the fixture

from kd_accel import assembly
from kd_accel.config import TrainConfig
from kd_accel.engine import Engine
from kd_accel.launch import start_accelerator
from kd_accel.optim import build_optimizer
from kd_accel.random_state import RandomState
from kd_accel.schema import validate

RESNET = {"layers": [1, 1, 1, 1], "width": 8}  # has BatchNorm


def start(teacher, *, student=None, **vision) -> Engine:
    arch = tiny.arch(16, 8)
    arch["vision_cfg"] |= vision
    config = validate(
        TrainConfig,
        {
            "name": "accumulate",
            "precision": "fp32",
            "data": {"shards": "none", "batch_size": 4},
            "student": {"arch": arch, **(student or {})},
            "teacher": {"path": str(teacher)},
            "objective": {"terms": {"kl": {"kind": "logit_kl"}} if vision else {"mfd": {"kind": "masked_feature_mse"}}},
            "optim": {"lr": 1e-2, "steps": 10},
            "train": {"accumulate": 3},
        },
    )  # fmt: skip
    accelerator = start_accelerator(precision="fp32", batch_size=4, grad_clip_norm=1.0, accumulate=3)
    torch.manual_seed(1)
    teachers = assembly.build_teachers(config)
    student = assembly.build_student(config, teachers)
    config = assembly.fit_models(config, student, teachers)
    engine = Engine(accelerator, student, teachers, optimizer=build_optimizer(student, config.optim), config=config)
    engine.module.train()
    return engine


def micro_batches() -> list:
    return [batch(number) for number in range(3)]


def gradients_of(features: dict) -> dict:
    return {name: rows.detach() - 0.1 for name, rows in features.items()}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_second_pass_drops_what_the_first_one_dropped(launched, tiny_teacher, stage):  # noqa: F811
    """Patch dropout and a masked view: features agree, and the generator ends where one pass would have left it."""
    launched(stage)
    engine = start(tiny_teacher, student={"projector": "linear"})
    seen = []
    again = engine._again
    engine._again = lambda batch: seen.append(again(batch)) or seen[-1]
    features, _ = engine.forward(micro_batches())
    after_one_pass = torch.get_rng_state()
    engine.backward(gradients_of(features))
    for name, rows in features.items():
        torch.testing.assert_close(torch.cat([part[name] for part in seen]), rows)
    assert torch.equal(torch.get_rng_state(), after_one_pass)
    assert not torch.equal(features["masked_image"], features["image"])
    applied, _ = engine.step(1e-2)
    assert applied


def test_a_pass_that_differs_is_refused(launched, tiny_teacher, monkeypatch):  # noqa: F811
    """Without the replay gradients would silently be wrong."""
    launched(0)
    engine = start(tiny_teacher, student={"projector": "linear"})
    monkeypatch.setattr(RandomState, "restore", lambda self: None)
    features, _ = engine.forward(micro_batches())
    with pytest.raises(RuntimeError, match=r"train.accumulate: the second pass gave .*masked_image features"):
        engine.backward(gradients_of(features))


def test_teachers_are_asked_once(launched, tiny_teacher):  # noqa: F811
    """Per micro-batch; the student twice."""
    launched(0)
    engine = start(tiny_teacher, patch_dropout=0.5)
    calls = {"student": 0, "teacher": 0}

    def count(name):
        return lambda *_: calls.update({name: calls[name] + 1})

    engine.student.register_forward_hook(count("student"))
    engine.accelerator.unwrap_model(engine.module).teachers["teacher"].register_forward_hook(count("teacher"))
    features, _ = engine.forward(micro_batches())
    engine.backward(gradients_of(features))
    assert calls == {"student": 6, "teacher": 3}


def test_running_statistics_move_once(launched, tiny_teacher):  # noqa: F811
    """BatchNorm after an accumulated step is BatchNorm after one pass over its micro-batches."""
    launched(0)
    engine = start(tiny_teacher, **RESNET)
    before = {name: value.clone() for name, value in engine.student.named_buffers()}
    features, _ = engine.forward(micro_batches())
    engine.backward(gradients_of(features))
    accumulated = {name: value.clone() for name, value in engine.student.named_buffers()}
    for name, value in engine.student.named_buffers():
        value.copy_(before[name])
    for each in micro_batches():
        engine.forward([each])
    for name, value in engine.student.named_buffers():
        torch.testing.assert_close(accumulated[name], value)
    assert any("running_mean" in name and not torch.equal(accumulated[name], before[name]) for name in before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_whole_batch(launched, tiny_teacher, checkpointing):  # noqa: F811
    """Three micro-batches against their concatenation, with and without recomputed activations; then clipped alike."""
    launched(0)
    norms, found = [], []
    for joined in (False, True):
        engine = start(tiny_teacher, student={"grad_checkpointing": checkpointing}, patch_dropout=0.0)
        batches = micro_batches()
        if joined:
            text = {name: torch.cat([b.text[name] for b in batches]) for name in batches[0].text}
            ids, image = (torch.cat([getattr(b, name) for b in batches]) for name in ("ids", "image"))
            batches = [type(batches[0])(ids, image, text)]
        features, _ = engine.forward(batches)
        engine.backward(gradients_of(features))
        found.append([p.grad.clone() for p in engine.student.parameters()])
        norms.append(engine.step(1e-2)[1])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert norms[0] > 1.0
