"""Class embeddings: read from safetensors, or made of names by a teacher."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from kd_accel.config import TeacherConfig
from kd_accel.models.class_embeddings import class_embeddings
from kd_accel.models.teacher import Teacher
from kd_accel.schema import ConfigError

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
    """A class is the mean of its prompts' unit embeddings, made unit again; blank lines are no classes."""
    (tmp_path / "names.txt").write_text("cat\n\ndog\n")
    templates = ["a photo of a {}.", "a drawing of a {}."]
    found = class_embeddings(str(tmp_path / "names.txt"), templates=templates, teacher=teacher, key=KEY)
    prompts = [template.format(name) for name in ("cat", "dog") for template in templates]
    rows = F.normalize(teacher.clip.encode_text(teacher.contract.tokenize(prompts)), dim=1).detach()
    torch.testing.assert_close(found, F.normalize(rows.view(2, 2, -1).mean(1), dim=1))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "no such file"),
        ("one.txt", b"cat\n", "holds 1 class names"),
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
