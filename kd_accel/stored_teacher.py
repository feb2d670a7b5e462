"""A teacher of whom there are only features on disk, and how a store is told to be a live teacher's."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from kd_accel.data.store_files import StoreInfo
from kd_accel.models.teacher import Teacher, key_of
from kd_accel.schema import ConfigError
from kd_accel.sections import TeacherConfig
from kd_accel.types import InputContract, TeacherSpec

NAMED_BY = ("arch", "pretrained", "path")


class StoredTeacher:
    """A teacher without weights; the loader brings what it would say. Attributes as those of Teacher.

    towers        of "image" and "text" those it has
    read          those of its towers that would have to run: none
    embed_dim     d
    logit_scale   1 / temperature: the configured one, or that it was trained to
    logit_bias    None, or the bias that it was trained to
    spec          what the objective has to know
    """

    wants = InputContract(None, None)

    def __init__(self, config: TeacherConfig, *, name: str = "teacher"):
        """Raises ConfigError for no usable store, one of another teacher than is named, and an unknown temperature."""
        info = StoreInfo.read(Path(config.store), f"{key_of(name)}.store")
        for key in NAMED_BY:
            if (given := getattr(config, key)) is not None and given != info.teacher.get(key):
                raise ConfigError(
                    f"{key_of(name)}.{key}={given}: {config.store} holds features of {teacher_in_words(info)}: drop"
                    f" {key}, or name another {key_of(name)}.store"
                )
        if config.temperature is None and info.logit_scale is None:
            raise ConfigError(
                f"{key_of(name)}.temperature: the features in {config.store} came from files, which bring no"
                " temperature: set it, for instance to 0.01"
            )
        self.towers, self.embed_dim = tuple(info.teacher_towers), info.embed_dim
        self.read: set[str] = set()
        self.logit_scale = 1 / config.temperature if config.temperature else info.logit_scale
        self.logit_bias = info.logit_bias
        self.spec = TeacherSpec(self.embed_dim, self.logit_scale, config.weight, self.towers)


def check_store(config: TeacherConfig, teacher: Teacher, *, name: str) -> None:
    """Raises ConfigError unless the features in `config.store` are those of `teacher`, whose weights are as loaded."""
    key = f"{key_of(name)}.store"
    info = StoreInfo.read(Path(config.store), key)
    ways = {"weights": weights_sha256, "preprocessing": preprocess_sha256}
    theirs = {"weights": info.weights_sha256, "preprocessing": info.preprocess_sha256}
    for what, sha256 in ways.items():
        if theirs[what] != sha256(teacher):
            raise ConfigError(
                f"{key}: the features in {config.store} are of {teacher_in_words(info)} with other {what} than this"
                " teacher: embed it again, or drop store"
            )


def weights_sha256(teacher: Teacher) -> str:
    """Of the model's tensors by name, with their types and shapes; call it before they are cast or quantised."""
    found = hashlib.sha256()
    for name, tensor in sorted(teacher.clip.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def preprocess_sha256(teacher: Teacher) -> str:
    """Of how pixels and captions reach the model."""
    image, text = teacher.contract.image, teacher.contract.text
    wanted = {
        "image": image and [image.size, image.mean, image.std, image.interpolation, image.resize_mode],
        "text": text and [text.context_length, text.tokenizer],
    }
    return hashlib.sha256(json.dumps(wanted).encode()).hexdigest()


def teacher_in_words(info: StoreInfo) -> str:
    """As the section named it."""
    return ", ".join(f"{key}={value}" for key, value in info.teacher.items() if value is not None) or "files"
