"""The class head of a release: what training made of it, and a stranger's in one line."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from kd_accel.models.class_head import FILE, ClassHead, read_class_head, write_class_head
from kd_accel.models.release import read_release, write_release
from kd_accel.schema import ConfigError


def head(num_classes: int = 3, width: int = 4, names=("a", "b", "c")) -> ClassHead:
    return ClassHead(torch.randn(num_classes, width), torch.randn(num_classes), names)


@pytest.mark.parametrize("names", [None, ("a", "b", "\u00e9 \U0001f431")])
def test_it_is_read_as_it_was_written(tmp_path, names):
    """With or without names; in half precision it is written as fp32."""
    written = head(names=names)
    write_class_head(tmp_path, ClassHead(written.weight.bfloat16(), written.bias, names))
    read = read_class_head(tmp_path / FILE, 4)
    assert read.weight.dtype == torch.float32
    assert read.weight.equal(written.weight.bfloat16().float())
    assert read.bias.equal(written.bias)
    assert read.names == names


def test_its_probabilities_are_those_of_the_student(student, view, captions):
    """On raw embeddings, as the term label_ce sees them."""
    model = student(num_classes=5)
    features = model(view, model.contract.text.tokenize(captions))
    found = model.released_head(model.state_dict()).probabilities(features["image"])
    torch.testing.assert_close(found, features["class_logits"].softmax(-1))


def test_a_release_has_it_beside_open_clips_files(tmp_path, student):
    model = student(num_classes=5)
    state = model.state_dict()
    rest = {"model_cfg": model.model_cfg, "contract": model.contract, "log_scale": 0.0, "logit_bias": None}
    given = {"state": model.release_state(state), "class_head": model.released_head(state)}
    write_release(tmp_path / "release", **given, **rest)
    assert read_class_head(tmp_path / "release" / FILE, model.embed_dim).weight.equal(model.class_head.weight)
    assert read_release(tmp_path / "release")[2] == model.model_cfg


def test_names_are_kept_where_each_class_has_one(student):
    """Labels may go beyond the classes that the data names."""
    model = student(num_classes=3)
    for names, kept in ((("a", "b", "c"), ("a", "b", "c")), (("a", "b"), None), (None, None)):
        model.class_names = names
        assert model.released_head(model.state_dict()).names == kept


def test_a_head_that_nothing_trains_is_not_released(student):
    model = student(num_classes=3)
    model.freeze_all_but({"image", "text"})
    assert model.released_head(model.state_dict()) is None
    assert student().released_head(student().state_dict()) is None


def spoil(file, what: str) -> None:
    tensors = load_file(file)
    match what:
        case "pickle":
            file.write_bytes(pickle.dumps(tensors))
        case "truncated":
            file.write_bytes(file.read_bytes()[:-3])
        case "missing":
            file.unlink()
        case "another width":
            save_file({**tensors, "weight": torch.zeros(3, 5)}, file)
        case "another number":
            save_file({**tensors, "bias": torch.zeros(4)}, file)
        case "more":
            save_file({**tensors, "more": torch.zeros(1)}, file)
        case "scalars":
            save_file({"weight": torch.zeros(()), "bias": torch.zeros(())}, file)
        case "not finite":
            save_file({**tensors, "bias": torch.full((3,), torch.nan)}, file)
        case "whole numbers":
            save_file({**tensors, "bias": torch.zeros(3, dtype=torch.int64)}, file)
        case names:
            save_file(tensors, file, metadata={"names": names})


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("pickle", "truncated, or not safetensors"),
        ("truncated", "truncated, or not safetensors"),
        ("missing", "no such file"),
        ("another width", r"needed are weight \[C, 4\] and bias \[C\]"),
        ("another number", r"it holds \{.*'bias': \[4\]"),
        ("more", "'more'"),
        ("scalars", "needed are weight"),
        ("not finite", "must be finite"),
        ("whole numbers", "must be finite floating-point"),
        ("[", "no JSON list of printable texts"),
        ("[" * 10**6, "no JSON list of printable texts"),
        ('{"a": 1}', "no JSON list of printable texts"),
        ("[1, 2, 3]", "no JSON list of printable texts"),
        (json.dumps(["a", "b", "\x1b[2J"]), "no JSON list of printable texts"),
        ('["a", "b"]', "2 names of 3 classes"),
    ],
)
def test_a_strangers_is_refused_in_one_line(tmp_path, what, said):
    write_class_head(tmp_path, head())
    spoil(tmp_path / FILE, what)
    with pytest.raises(ConfigError, match=said) as error:
        read_class_head(tmp_path / FILE, 4)
    assert str(error.value).startswith(str(tmp_path / FILE))
    assert len(str(error.value).splitlines()) == 1
