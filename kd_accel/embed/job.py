"""What is to be embedded: which teacher's features, of which samples, views and texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from kd_accel import assembly
from kd_accel.config import teachers_of
from kd_accel.data.embeddings import TOWERS
from kd_accel.data.open import open_source
from kd_accel.data.source import Source
from kd_accel.data.store_files import StoreInfo, captions_of
from kd_accel.data.views import Views, largest, shared_views
from kd_accel.embed_config import EmbedConfig
from kd_accel.models.device import DTYPES, own_device
from kd_accel.models.image import images_at_once
from kd_accel.models.teacher import Teacher, key_of
from kd_accel.schema import ConfigError
from kd_accel.sections import TeacherConfig
from kd_accel.stored_teacher import NAMED_BY, preprocess_sha256, weights_sha256


@dataclass(frozen=True)
class Job:
    """One store."""

    config: EmbedConfig
    teacher: Teacher | None  # on its device, in its precision; None: the features come from files
    source: Source
    views: Views | None  # None: no images, or views that were not ours
    info: StoreInfo

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @property
    def towers(self) -> list[str]:
        return self.info.towers


def live_job(config: EmbedConfig) -> Job:
    """Of a teacher that runs. Raises ConfigError for models and data that cannot be had, or do not fit each other."""
    name, section = chosen_teacher(config)
    config = _with_teacher(config, name, _live(name, section))
    torch.manual_seed(config.seed)
    teachers = assembly.build_teachers(config)
    student = assembly.build_student(config, teachers)
    fitted = assembly.fit_models(config, student, teachers)
    teacher = teachers[name]
    towers = [tower for tower in TOWERS if tower in (config.towers or teacher.read or teacher.towers)]
    if missing := set(towers) - set(teacher.towers):
        raise ConfigError(f"towers: {key_of(name)} has no {' and no '.join(sorted(missing))} tower")
    contracts = {n: model.wants for n, model in {"student": student, **teachers}.items()}
    contracts[name] = teacher.contract.only(teacher.read | set(towers))
    views = _views(fitted, largest(contracts.values())) if "image" in towers else None
    info = StoreInfo(
        teacher=_named(section),
        weights_sha256=weights_sha256(teacher),
        preprocess_sha256=preprocess_sha256(teacher),
        embed_dim=teacher.embed_dim,
        logit_scale=teacher.logit_scale,
        logit_bias=teacher.logit_bias,
        teacher_towers=list(teacher.towers),
        views=None if views is None else _described(views),
        **_of_every_store(config, towers),
    )
    teacher.to(own_device(), DTYPES[config.precision])
    teacher.images_at_once = images_at_once(own_device())
    return Job(config, teacher, _source(config, towers), views, info)


def imported_job(config: EmbedConfig, width: int) -> Job:
    """Of features `width` wide that another program made: nobody knows of which weights and views."""
    _, section = chosen_teacher(config)
    towers = config.towers or ["image"]
    info = StoreInfo(
        teacher=_named(section),
        weights_sha256=None,
        preprocess_sha256=None,
        embed_dim=width,
        logit_scale=None if section.temperature is None else 1 / section.temperature,
        logit_bias=None,
        teacher_towers=towers,
        views=None,
        **_of_every_store(config, towers),
    )
    return Job(config, None, _source(config, towers), None, info)


def live_teacher(config: EmbedConfig) -> Teacher:
    """The teacher alone, as its weights came."""
    name, section = chosen_teacher(config)
    return Teacher(_live(name, section), name=name)


def chosen_teacher(config: EmbedConfig) -> tuple[str, TeacherConfig]:
    """(name, section) of the one to embed. Raises ConfigError where there is none, or teacher_name has to say which."""
    teachers = teachers_of(config)
    if not teachers:
        raise ConfigError("teacher: there is none to embed: add the section teacher")
    if config.teacher_name is None and len(teachers) > 1:
        raise ConfigError(f"teacher_name: which of {', '.join(teachers)}? One store holds one teacher's features")
    name = config.teacher_name or next(iter(teachers))
    if name not in teachers:
        raise ConfigError(f"teacher_name: no teacher '{name}'; one of {', '.join(teachers)}")
    return name, teachers[name]


def _live(name: str, section: TeacherConfig) -> TeacherConfig:
    """The section whatever its placement: a config that reads a store is also the one that makes it."""
    if section.arch is None and section.path is None:
        raise ConfigError(f"{key_of(name)}: a store cannot be made of a store: set arch and pretrained, or path")
    return section.model_copy(update={"placement": "replicated", "store": None})


def _with_teacher(config: EmbedConfig, name: str, section: TeacherConfig) -> EmbedConfig:
    if config.teacher is not None:
        return config.model_copy(update={"teacher": section})
    return config.model_copy(update={"teachers": config.teachers | {name: section}})


def _views(config: EmbedConfig, size: tuple[int, int]) -> Views:
    """The views of the training's first epochs; those of the other teachers' stores, where there are some."""
    wanted = Views(size, config.data.augment, config.seed)
    others = {n: store.views for n, store in assembly.open_stores(config).items() if store.views is not None}
    views = shared_views(wanted, others)
    if others and views.count != config.views:
        raise ConfigError(f"views={config.views}: the store of {next(iter(others))} has {views.count}: take as many")
    return Views(views.size, views.augment, views.seed, config.views)


def _described(views: Views) -> dict:
    augment = views.augment.model_dump(mode="json")
    return {"size": list(views.size), "augment": augment, "seed": views.seed, "count": views.count}


def _named(section: TeacherConfig) -> dict[str, str | None]:
    return {key: getattr(section, key) for key in NAMED_BY}


def _of_every_store(config: EmbedConfig, towers: list[str]) -> dict:
    return {
        "towers": towers,
        "captions": captions_of(config.data) if "text" in towers else None,
        "precision": config.precision,
        "dtype": config.dtype,
    }


def _source(config: EmbedConfig, towers: list[str]) -> Source:
    return open_source(config.data, images="image" in towers, captions="text" in towers)[0]
