"""What the classes of a labelled dataset mean to a teacher: one unit embedding per class.

class_embeddings("classes.txt", templates=["a photo of a {}."], teacher=teacher, key="objective.terms.label.classes")

C classes, P templates, d embedding width.
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

PROMPTS_AT_A_TIME = 256


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
    names = read_names(file, key)
    if len(names) < 2:
        raise ConfigError(f"{key}: {file} holds {len(names)} class names, one per line; at least 2 are needed")
    if not templates or any("{}" not in template for template in templates):
        where = f"{key.removesuffix('classes')}templates"
        raise ConfigError(f"{where}: every one needs {{}}, where the class name goes, and there is at least one")
    assert teacher is not None, "the config asks for a teacher where class names are to be embedded"
    return prompt_embeddings(names, templates, teacher)


def prompt_embeddings(names: list[str], templates: list[str], teacher: Teacher) -> Tensor:
    """[C, d] fp32 unit rows: of each name the mean of the unit embeddings of it in every template."""
    rows = _embed([template.replace("{}", name) for name in names for template in templates], teacher)  # [C * P, d]
    return F.normalize(rows.unflatten(0, (len(names), len(templates))).mean(dim=1), dim=1)


def read_names(file: Path, key: str) -> list[str]:
    """The lines of a file. Raises ConfigError, which begins with `key`, for an empty one in between."""
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: {file} cannot be read as UTF-8 text: {error}") from None
    if "" in names:
        raise ConfigError(
            f"{key}: {file}: line {names.index('') + 1} is empty; a label is the number of its line, from 0"
        )
    return names


def _stored(file: Path, key: str) -> Tensor:
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{key}: {file} is not a safetensors file ({error})") from None
    embeddings = found.get("embeddings")
    if embeddings is None or embeddings.ndim != 2 or len(embeddings) < 2:
        shapes = {name: list(tensor.shape) for name, tensor in found.items()}
        raise ConfigError(f"{key}: {file} needs a tensor 'embeddings' [C, d] and holds {shapes}")
    lengths = embeddings.float().norm(dim=1)
    if odd := (~(lengths.isfinite() & (lengths > 0))).nonzero()[:, 0].tolist():
        raise ConfigError(f"{key}: {file}: embedding {odd[0]} is zero or not finite, which has no direction")
    return embeddings.float()


@torch.no_grad()
def _embed(prompts: list[str], teacher: Teacher) -> Tensor:
    """Unit rows, fp32."""
    parts = [prompts[start : start + PROMPTS_AT_A_TIME] for start in range(0, len(prompts), PROMPTS_AT_A_TIME)]
    rows = [teacher.encode_captions(part).float() for part in parts]
    return F.normalize(torch.cat(rows), dim=1)
