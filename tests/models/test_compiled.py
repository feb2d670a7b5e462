"""Compiled blocks say what eager ones say, for few graphs, and leave no trace in state dicts."""

from __future__ import annotations

import functools

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.utils import counters

from kd_accel.config import TrainConfig
from kd_accel.models.compiled import blocks_of, check_compiler, compile_blocks
from kd_accel.models.int8 import quantise
from kd_accel.models.sparsity import sparsify
from kd_accel.models.student import Student
from kd_accel.models.teacher import Teacher
from kd_accel.models.text import encode_text
from kd_accel.schema import ConfigError, validate
from kd_accel.sections import StudentConfig, TeacherConfig
from kd_accel.train import run

ROUNDING = 1e-5  # of a tensor's largest element, as of two orders of summation in tests/distributed/test_parity.py


@pytest.fixture(autouse=True)
def _forget():
    """Graphs and counts of other tests."""
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def traced(monkeypatch):
    """Dynamo and AOTAutograd as in a training, without the seconds of C++ that inductor takes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def features(student: Student, rows: int = 3, length: int = 12) -> dict[str, Tensor]:
    torch.manual_seed(1)  # of patches that are dropped, too
    image = torch.randint(256, (rows, 3, 32, 32), dtype=torch.uint8)
    return student(image, torch.randint(1, 49408, (rows, length)))


def gradients(student: Student) -> dict[str, Tensor]:
    sum(rows.square().sum() for rows in features(student).values()).backward()
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def check_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= ROUNDING * tensor.abs().max(), name


def build(mask_ratio: float | None = None, **section) -> Student:
    torch.manual_seed(0)
    config = StudentConfig(**{"arch": tiny.arch(layers=2), **section})
    return Student(config, {}, mask_ratio=mask_ratio)


def timm(name: str) -> dict:
    return {"arch": {"embed_dim": 8, "vision_cfg": {"timm_classifier": name, "image_size": 32}}}


@pytest.mark.parametrize(
    ("section", "blocks"),
    [
        ({}, 3),  # two of the image tower, one of the text tower
        ({"grad_checkpointing": True}, 3),
        ({"mask_ratio": 0.5}, 3),
        pytest.param(timm("test_vit"), 6, marks=pytest.mark.slow),
        pytest.param(timm("test_resnet"), 4, marks=pytest.mark.slow),  # stages
    ],
    ids=["vit", "checkpointed", "masked", "timm-vit", "timm-resnet"],
)
def test_features_and_gradients_are_those_of_eager_blocks(section, blocks, traced):
    eager, compiled = build(**section), build(**section)
    assert len(compile_blocks(compiled)) == blocks
    check_close(gradients(compiled), gradients(eager))
    assert 0 < graphs() <= blocks
    assert not counters["graph_break"]
    assert compiled.state_dict().keys() == eager.state_dict().keys()
    check_close(features(compiled.eval()), features(eager.eval()))


@pytest.mark.slow
@pytest.mark.timeout(1800)  # C++ is compiled
def test_kernels_compute_what_eager_blocks_do():
    eager, compiled = build(), build()
    compile_blocks(compiled)
    check_close(gradients(compiled), gradients(eager))
    assert graphs() == 2


@pytest.mark.slow
def test_captions_of_any_length_take_two_graphs(traced):
    """One for the first length, one for all others; the blocks of a tower share them."""
    student = build(arch=tiny.arch() | {"text_cfg": tiny.arch()["text_cfg"] | {"layers": 3}})
    compile_blocks(student.clip.transformer)
    for length in (12, 9, 7, 12, 5, 10, 11, 4):
        encode_text(student.clip, torch.ones(2, length, dtype=torch.int64)).sum().backward()
    assert graphs() == 2
    with torch.no_grad():
        for length in (12, 9, 7, 4):
            encode_text(student.clip, torch.ones(2, length, dtype=torch.int64))
    assert graphs() == 4


def test_zeros_of_a_sparse_student_stay(traced):
    section = {"arch": tiny.arch(32, layers=2)}
    eager, compiled = build(**section), build(**section)
    assert sparsify(eager.clip)
    sparsify(compiled.clip)
    compile_blocks(compiled)
    check_close(gradients(compiled), gradients(eager))
    assert graphs() > 0


@pytest.mark.parametrize("int8", [False, True])
def test_a_teacher_says_the_same(int8, tiny_teacher, traced):
    eager, compiled = (Teacher(TeacherConfig(path=str(tiny_teacher))) for _ in range(2))
    if int8:
        quantise(eager)
        quantise(compiled)
    compile_blocks(compiled)
    check_close(features(compiled), features(eager))
    assert graphs() == 2


def test_a_model_without_blocks_is_left_alone():
    plain = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert blocks_of(plain) == []
    assert compile_blocks(plain) == []


def test_no_block_lies_in_another():
    student = build(**timm("convnext_atto"))
    blocks = blocks_of(student)
    assert len(blocks) == 4  # stages, which have blocks of their own
    inside = {id(part) for block in blocks for part in block.modules() if part is not block}
    assert not inside & {id(block) for block in blocks}


def test_a_machine_without_a_compiler():
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "nowhere"), "force_disable_caches": True}),
        pytest.raises(ConfigError, match=r"train.compile: .*install a C\+\+ compiler.*train.compile=false.*nowhere"),
    ):
        check_compiler(torch.device("cpu"))


@pytest.mark.slow
def test_a_run_goes_on_eager_and_compiled_again(tmp_path, train_shards, tiny_teacher, traced):
    values = {
        "name": "run", "output_dir": str(tmp_path), "resume": "auto", "precision": "fp32",
        "data": {"shards": str(train_shards), "batch_size": 8, "num_workers": 0},
        "student": {"arch": tiny.arch(), "projector": "linear"}, "teacher": {"path": str(tiny_teacher)},
        "objective": {"terms": {"feature": {"kind": "feature_mse"}}}, "save": {"keep_last": 3},
    }  # fmt: skip
    before = 0
    for step, compiled in ((1, True), (2, False), (3, True)):
        torch._dynamo.reset()
        run(validate(TrainConfig, values | {"optim": {"lr": 1e-2, "steps": step}, "train": {"compile": compiled}}))
        assert (graphs() > before) is compiled
        before = graphs()
    steps = [tmp_path / "run/checkpoints" / f"step_{step:08d}" for step in (1, 2, 3)]
    states = [{p.relative_to(at): load_file(p).keys() for p in sorted(at.rglob("*.safetensors"))} for at in steps]
    assert states[0]
    assert states[0] == states[1] == states[2]


def test_int8_students_are_refused():
    values = {
        "name": "run", "data": {"shards": "none", "batch_size": 4},
        "student": {"arch": tiny.arch(), "pretrained": "weights.pt"},
        "objective": {"terms": {"clip": {"kind": "clip"}}}, "optim": {"lr": 1e-3, "steps": 1},
        "compress": {"int8": "modelopt"},
    }  # fmt: skip
    validate(TrainConfig, values)
    with pytest.raises(ConfigError, match=r"train.compile.*compress.int8"):
        validate(TrainConfig, values | {"train": {"compile": True}})
