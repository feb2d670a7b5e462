"""The teacher stays frozen, and comes from a release, a run, or an architecture with weights."""

from __future__ import annotations

import math

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from kd_accel.models.teacher import Teacher
from kd_accel.schema import ConfigError
from kd_accel.sections import TeacherConfig


@pytest.fixture
def teacher(release):
    return Teacher(TeacherConfig(path=str(release("timm", log_scale=3.0, logit_bias=-5.0))))


def test_frozen_and_in_eval_mode_for_ever(teacher):
    """train() on the module or on one that holds it changes nothing: BatchNorm and dropout stay off."""
    holder = torch.nn.Sequential(teacher)
    holder.train()
    assert not [p for p in teacher.parameters() if p.requires_grad]
    assert not [module for module in teacher.modules() if module.training]


def test_features_equal_the_released_model_and_carry_no_gradient(teacher, student, view, captions):
    model = student("timm").eval()
    tokens = model.contract.text.tokenize(captions)
    out = teacher(view, tokens)
    assert not out["image"].requires_grad
    assert not out["text"].requires_grad
    torch.testing.assert_close(out, {key: row.detach() for key, row in model(view, tokens).items()}, rtol=0, atol=0)


def test_some_images_at_a_time(teacher, view):
    """Every piece is seen once, in order, and no more rows than were asked for are seen together."""
    teacher.read = {"image"}
    whole, seen = teacher(view, None)["image"], []
    teacher.clip.visual.register_forward_hook(lambda tower, given, said: seen.append(len(said)))
    teacher.images_at_once = len(view) - 1
    torch.testing.assert_close(teacher(view, None)["image"], whole)
    assert seen == [len(view) - 1, 1]


def test_training_forward_does_not_move_batch_statistics(teacher, view, captions):
    before = {name: buffer.clone() for name, buffer in teacher.named_buffers()}
    teacher.train()
    teacher(view, teacher.contract.text.tokenize(captions))
    torch.testing.assert_close(dict(teacher.named_buffers()), before, rtol=0, atol=0)


def test_scale_is_the_one_it_was_trained_to(teacher):
    assert teacher.logit_scale == pytest.approx(math.exp(3.0), rel=1e-6)
    assert teacher.logit_bias == -5.0
    assert teacher.embed_dim == 16


def test_architecture_with_weights(arch, tmp_path, monkeypatch, view):
    """arch and pretrained give open_clip's model of that name with the weights of the file."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-tiny", arch())
    reference = open_clip.CLIP(**arch()).eval()
    save_file(reference.state_dict(), tmp_path / "weights.safetensors")
    teacher = Teacher(TeacherConfig(arch="ViT-tiny", pretrained=str(tmp_path / "weights.safetensors")))
    torch.testing.assert_close(teacher.clip.visual.proj.data, reference.visual.proj.data)
    assert teacher.logit_scale == pytest.approx(reference.logit_scale.exp().item())


def test_building_a_teacher_does_not_move_the_seed(release, student):
    """The same seed gives the same student with and without a teacher, so that they can be compared."""
    path = str(release())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Teacher(TeacherConfig(path=path))
    torch.testing.assert_close(torch.rand(3), expected)


def test_directory_without_weights_is_refused(release):
    """open_clip would go on with random weights."""
    folder = release()
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="no such file, so the release has no weights"):
        Teacher(TeacherConfig(path=str(folder)))


def test_spec_is_what_the_objective_has_to_know(release):
    """Width, logit scale and weight; a temperature of the config replaces the trained one."""
    path = str(release("timm", log_scale=3.0))
    trained, given = (Teacher(TeacherConfig(path=path, weight=0.5, temperature=t)) for t in (None, 0.02))
    assert trained.spec.logit_scale == pytest.approx(math.exp(3.0))
    assert given.spec.logit_scale == pytest.approx(50.0)
    assert (trained.spec.embed_dim, trained.spec.weight) == (trained.embed_dim, 0.5)


@pytest.mark.parametrize(("name", "key"), [("teacher", "teacher"), ("large", "teachers.large")])
def test_a_wrong_one_is_named_by_its_key(name, key):
    with pytest.raises(ConfigError, match=rf"^{key}\.arch: unknown architecture"):
        Teacher(TeacherConfig(arch="ViT-B-999", pretrained="openai"), name=name)


def test_a_path_that_is_a_name_of_open_clip():
    """As open_clip's --distill-model and --distill-pretrained in one word."""
    with pytest.raises(ConfigError, match=r"^teacher\.path: ViT-B-32,openai: no such directory.*teacher\.arch=ViT"):
        Teacher(TeacherConfig(path="ViT-B-32,openai"))


@pytest.mark.parametrize("name", ["train", "keys"])
def test_a_name_that_torch_has_taken(release, name):
    """A module of several teachers cannot call one of them that."""
    with pytest.raises(ConfigError, match=rf"^teachers\.{name}: .*give the teacher another"):
        Teacher(TeacherConfig(path=str(release())), name=name)
