"""Class embeddings: read from safetensors, or made of names by a teacher."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from kd_accel.models.class_embeddings import class_embeddings
from kd_accel.models.teacher import Teacher
from kd_accel.schema import ConfigError
from kd_accel.sections import TeacherConfig

KEY = "objective.terms.label.classes"


@pytest.fixture
def teacher(release):
    return Teacher(TeacherConfig(path=str(release("vit"))))


def test_stored_embeddings_are_made_unit_rows(tmp_path):
    stored = torch.randn(4, 6)
    save_file({"embeddings": stored}, tmp_path / "c.safetensors")
    found = class_embeddings(str(tmp_path / "c.safetensors"), templates=[], teacher=None, key=KEY)
    torch.testing.assert_close(found, F.normalize(stored, dim=1))


def test_names_are_embedded_in_every_template(tmp_path, teacher):
    """A class is the mean of its prompts' unit embeddings, made unit again."""
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    templates = ["a photo of a {}.", "a drawing of a {}."]
    found = class_embeddings(str(tmp_path / "names.txt"), templates=templates, teacher=teacher, key=KEY)
    prompts = [template.format(name) for name in ("cat", "dog") for template in templates]
    rows = F.normalize(teacher.clip.encode_text(teacher.contract.text.tokenize(prompts)), dim=1).detach()
    torch.testing.assert_close(found, F.normalize(rows.view(2, 2, -1).mean(1), dim=1))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "no such file"),
        ("one.txt", b"cat\n", "holds 1 class names"),
        ("gap.txt", b"cat\n\ndog\n", "line 2 is empty"),
        ("broken.safetensors", b"not one", "is not a safetensors file"),
    ],
)
def test_a_file_that_is_of_no_use(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^{KEY}: .*{message}"):
        class_embeddings(str(tmp_path / name), templates=["{}"], teacher=None, key=KEY)


def test_a_file_without_the_tensor(tmp_path):
    save_file({"weights": torch.zeros(2, 3)}, tmp_path / "c.safetensors")
    with pytest.raises(ConfigError, match=r"needs a tensor 'embeddings' \[C, d\] and holds {'weights': \[2, 3\]}"):
        class_embeddings(str(tmp_path / "c.safetensors"), templates=[], teacher=None, key=KEY)


def test_prompts_are_embedded_a_few_at_a_time(tmp_path, teacher, monkeypatch):
    """The parts give what the whole gives, also where they cut a class in two."""
    (tmp_path / "names.txt").write_text("cat\ndog\nbird\n")
    values = {"templates": ["a {}", "{}"], "teacher": teacher, "key": KEY}
    whole = class_embeddings(str(tmp_path / "names.txt"), **values)
    monkeypatch.setattr("kd_accel.models.class_embeddings.PROMPTS_AT_A_TIME", 3)
    torch.testing.assert_close(class_embeddings(str(tmp_path / "names.txt"), **values), whole)


def test_names_that_are_no_text(tmp_path, teacher):
    (tmp_path / "names.txt").write_bytes(b"cat\ncaf\xe9\n")
    with pytest.raises(ConfigError, match=rf"^{KEY}: .*names\.txt cannot be read as UTF-8"):
        class_embeddings(str(tmp_path / "names.txt"), templates=["{}"], teacher=teacher, key=KEY)


@pytest.mark.parametrize("templates", [[], ["a photo"], ["a {}", "a photo"]])
def test_templates_without_the_name(tmp_path, teacher, templates):
    """All classes would be one."""
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    with pytest.raises(ConfigError, match=r"^objective\.terms\.label\.templates: every one needs \{\}"):
        class_embeddings(str(tmp_path / "names.txt"), templates=templates, teacher=teacher, key=KEY)


@pytest.mark.parametrize("number", [0.0, float("nan"), float("inf")])
def test_an_embedding_without_a_direction(tmp_path, number):
    save_file({"embeddings": torch.tensor([[1.0, 0.0], [number, 0.0]])}, tmp_path / "c.safetensors")
    with pytest.raises(ConfigError, match=rf"^{KEY}: .*embedding 1 is zero or not finite"):
        class_embeddings(str(tmp_path / "c.safetensors"), templates=[], teacher=None, key=KEY)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_stored_classes(tmp_path, count):
    save_file({"embeddings": torch.ones(count, 3)}, tmp_path / "c.safetensors")
    with pytest.raises(ConfigError, match=rf"^{KEY}: .*'embeddings': \[{count}, 3\]"):
        class_embeddings(str(tmp_path / "c.safetensors"), templates=[], teacher=None, key=KEY)
