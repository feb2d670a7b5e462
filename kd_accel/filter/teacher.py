"""The model that compares images and prompts: which one, on its device, and what it says of the prompts."""

from __future__ import annotations

from torch import Tensor

from kd_accel.data.embeddings import EmbeddingStore
from kd_accel.filter.prompts import is_stored, prompt_texts
from kd_accel.filter_config import FilterConfig
from kd_accel.models.class_embeddings import class_embeddings, prompt_embeddings
from kd_accel.models.device import DTYPES, own_device
from kd_accel.models.image import images_at_once
from kd_accel.models.teacher import Teacher
from kd_accel.schema import ConfigError
from kd_accel.sections import TeacherConfig
from kd_accel.stored_teacher import NAMED_BY, check_store, teacher_in_words


def teacher_section(config: FilterConfig, store: EmbeddingStore | None) -> TeacherConfig | None:
    """The model of images and prompts: the configured one, else the store's; None where nobody has to say anything.

    Raises ConfigError for a store that does not say whose features it holds.
    """
    if store is None or config.teacher is not None:
        return config.teacher
    if is_stored(config.prompts):
        return None
    named = {key: store.info.teacher.get(key) for key in NAMED_BY}
    if named["path"] is None and named["arch"] is None:
        raise ConfigError(
            f"teacher: {store.folder} holds features of {teacher_in_words(store.info)}: say of which model"
        )
    return TeacherConfig(**named)


def load_teacher(section: TeacherConfig, config: FilterConfig) -> Teacher:
    """On the device, in its precision. Raises ConfigError where the store's features are not this teacher's."""
    teacher = Teacher(section)
    if config.store is not None:
        check_store(section.model_copy(update={"store": config.store}), teacher, name="teacher")
    teacher.images_at_once = images_at_once(own_device())
    return teacher.to(own_device(), DTYPES[config.precision])


def embed_prompts(config: FilterConfig, teacher: Teacher | None) -> Tensor:  # [P, d]
    """Unit rows of the prompts, on the CPU. Raises ConfigError for prompts and teachers that have none."""
    if is_stored(config.prompts):
        return class_embeddings(config.prompts, templates=config.templates, teacher=None, key="prompts")
    if teacher.contract.text is None:
        raise ConfigError("teacher: has no text tower: give prompts as embeddings, a .safetensors")
    return prompt_embeddings(prompt_texts(config.prompts), config.templates, teacher).cpu()
