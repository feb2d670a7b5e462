"""What the classes of a labelled dataset mean to a teacher: one unit embedding per class.

class_embeddings("classes.txt", templates=["a photo of a {}."], teacher=teacher, key="objective.terms.label.classes")
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kd_accel.models.teacher import Teacher
from kd_accel.schema import ConfigError


def class_embeddings(path: str, *, templates: list[str], teacher: Teacher | None, key: str) -> Tensor:
    """[C, d] fp32 unit rows: of a safetensors file with `embeddings` [C, d], or of a file with one class name per line.

    A name stands in every template, and its class is the mean of the unit embeddings. Raises ConfigError, which begins
    with `key`, for a file that is missing or holds something else.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{key}: no such file: {path}")
    if file.suffix == ".safetensors":
        return F.normalize(_stored(file, key), dim=1)
    names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(names) < 2:
        raise ConfigError(f"{key}: {path} holds {len(names)} class names, one per line; at least 2 are needed")
    assert teacher is not None, "the config asks for a teacher where class names are to be embedded"
    return torch.stack([_embed(name, templates, teacher) for name in names])


def _stored(file: Path, key: str) -> Tensor:
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{key}: {file} is not a safetensors file ({error})") from None
    embeddings = found.get("embeddings")
    if embeddings is None or embeddings.ndim != 2:
        shapes = {name: list(tensor.shape) for name, tensor in found.items()}
        raise ConfigError(f"{key}: {file} needs a tensor 'embeddings' [C, d] and holds {shapes}")
    return embeddings.float()


@torch.no_grad()
def _embed(name: str, templates: list[str], teacher: Teacher) -> Tensor:
    """[d]"""
    tokens = teacher.contract.tokenize([template.replace("{}", name) for template in templates])
    rows = teacher.clip.encode_text(tokens, normalize=False).float()
    return F.normalize(F.normalize(rows, dim=1).mean(dim=0), dim=0)
