"""A config's parts as objects that fit together: teachers, student, loader, objective."""

from __future__ import annotations

import math
from contextlib import closing
from itertools import islice

import torch
from torch import Tensor, nn

from kd_accel import distributed, int8, terms
from kd_accel.bindings import features_read, teacher_towers_read
from kd_accel.config import TeacherConfig, TrainConfig, teachers_of
from kd_accel.data.batches import BatchMaker
from kd_accel.data.embeddings import EmbeddingStore
from kd_accel.data.loader import TrainLoader, rows_per_micro_batch
from kd_accel.data.open import tar_fields
from kd_accel.data.stream import TarStream, expand_streams
from kd_accel.data.stream_loader import StreamLoader
from kd_accel.data_config import DataConfig
from kd_accel.fit import check_class_width, check_fit, check_towers, match_towers
from kd_accel.models.attention import pack_attention
from kd_accel.models.class_embeddings import class_embeddings
from kd_accel.models.image import to_model_input
from kd_accel.models.inherit import inherit
from kd_accel.models.int8 import quantise
from kd_accel.models.release import read_release
from kd_accel.models.release_folder import resolve_release
from kd_accel.models.running_stats import normalises_over_batches
from kd_accel.models.sparsity import sparsify
from kd_accel.models.student import Student
from kd_accel.models.teacher import Teacher, key_of
from kd_accel.objective import Objective
from kd_accel.schema import ConfigError
from kd_accel.stored_teacher import StoredTeacher, check_store
from kd_accel.terms import LabelCE, MaskedFeatureMSE
from kd_accel.types import InputContract

Teachers = dict[str, Teacher | StoredTeacher]
CALIBRATION_SAMPLES, CALIBRATION_ROWS = 512, 64  # pictures that show the ranges of an int8 tower, so many at a time


def build_teachers(config: TrainConfig, *, weights: bool = True) -> Teachers:
    """By name, frozen. Raises ConfigError when a model, its weights or its stored features are not to be had.

    `weights`: false leaves those out that would have to be fetched, and what follows from them.
    """
    return {name: _build_teacher(name, section, weights) for name, section in teachers_of(config).items()}


def _build_teacher(name: str, section: TeacherConfig, weights: bool) -> Teacher | StoredTeacher:
    if section.placement == "cached":
        return StoredTeacher(section, name=name)
    teacher = Teacher(section, name=name, weights=weights)
    pack_attention(teacher)
    if not weights:
        return teacher
    if section.store is not None:
        check_store(section, teacher, name=name)
    if section.placement == "int8":
        quantise(teacher)
    return teacher


def build_student(config: TrainConfig, teachers: Teachers, *, weights: bool = True) -> Student:
    """With the masked view that a term asks for; `weights`: false leaves those out that it starts from.

    Raises ConfigError.
    """
    ratios = {t.mask_ratio for t in config.objective.terms.values() if isinstance(t, MaskedFeatureMSE)}
    if len(ratios) > 1:
        raise ConfigError(f"objective.terms: masked_feature_mse with mask_ratio {sorted(ratios)}: one view is made")
    dims = {name: teacher.embed_dim for name, teacher in teachers.items()}
    student = Student(config.student, dims, mask_ratio=next(iter(ratios), None), weights=weights)
    if config.compress.int8 is None:  # whose quantisers belong to the operations of a release
        pack_attention(student)
    if config.student.init is not None and weights:
        student.inherited = inherit(
            student.clip, _forebear(config, teachers), where=f"student.init={config.student.init}"
        )
    return student


def _forebear(config: TrainConfig, teachers: Teachers) -> nn.Module:
    """The model whose weights the student starts from."""
    init = config.student.init
    if init != "teacher" and init not in teachers:
        return read_release(resolve_release(init))[0]
    found = teachers.get(init) or (next(iter(teachers.values())) if len(teachers) == 1 else None)
    if found is None:
        raise ConfigError(
            f"student.init={init}: name one of the teachers ({', '.join(teachers) or 'there is none'}), or a run"
        )
    if isinstance(found, StoredTeacher):
        raise ConfigError(f"student.init={init}: of a teacher with placement=cached there are no weights to start from")
    return found.clip


def fit_models(config: TrainConfig, student: Student, teachers: Teachers) -> TrainConfig:
    """Let no tower run that no term reads, and freeze what of the student is not read.

    Returns the config with every term's towers matched. Raises ConfigError for terms that these models cannot serve.
    """
    specs = {name: teacher.spec for name, teacher in teachers.items()}
    objective = match_towers(config.objective, towers=student.towers, teachers=specs)
    check_towers(objective, widths=student.widths, teachers=specs)
    student.freeze_all_but(set().union(*(features_read(t, student.widths) for t in objective.terms.values())))
    if config.compress.sparsity is not None:
        student.sparse = _sparsified(student)
    config = config.model_copy(update={"objective": objective})
    stores = open_stores(config)
    for name, teacher in teachers.items():
        teacher.read = towers_read(config, name) - (stores[name].towers if name in stores else set())
        if isinstance(teacher, StoredTeacher) and teacher.read:
            raise ConfigError(
                f"{key_of(name)}.store: terms read the {' and '.join(sorted(teacher.read))} features of {name}, which"
                " are not in the store: embed all towers, or choose another placement, which runs the missing one"
            )
    return config


def _sparsified(student: Student) -> str:
    """What became of it, in a sentence."""
    found = sparsify(student.clip)
    if not found:
        raise ConfigError(
            "compress.sparsity: no layer of the student can be sparse: linear and convolutional ones with inputs in"
            " multiples of 16 and outputs of 8 can"
        )
    total, sparse = sum(p.numel() for p in student.clip.parameters()), sum(found.values())
    return f"2:4 sparsity of {len(found)} layers, {sparse:,} of {total:,} weights: half of these are zero"


def towers_read(config: TrainConfig, name: str) -> set[str]:
    """Of "image" and "text" the towers of a teacher that terms read, once `fit_models` has matched theirs."""
    objective, names = config.objective, list(teachers_of(config))
    readers = [term for term in objective.terms.values() if name in terms.teachers_read(term, names)]
    return set().union(*map(teacher_towers_read, readers))


def open_stores(config: TrainConfig) -> dict[str, EmbeddingStore]:
    """By teacher: the features on disk that terms read. Raises ConfigError for a store that cannot be read."""
    sections = {name: section for name, section in teachers_of(config).items() if section.store is not None}
    opened = {
        name: EmbeddingStore(section.store, key=f"{key_of(name)}.store", towers=towers_read(config, name))
        for name, section in sections.items()
    }
    return {name: store for name, store in opened.items() if store.towers}


def build_loader(config: TrainConfig, student: Student, teachers: Teachers) -> TrainLoader | StreamLoader:
    """Of this rank's part of every global batch. Raises ConfigError for unusable data."""
    contracts = {name: model.wants for name, model in {"student": student, **teachers}.items()}
    ranks = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    dealt = {"seed": config.seed, "accumulate": config.train.accumulate, **ranks}
    return _loader(config.data, contracts, dealt, stores=open_stores(config))


def _loader(
    data: DataConfig, contracts: dict[str, InputContract], dealt: dict[str, int], *, stores: dict[str, EmbeddingStore]
) -> TrainLoader | StreamLoader:
    """`dealt`: seed, accumulate, rank and world_size."""
    if data.loader == "indexed":
        return TrainLoader(data, contracts=contracts, stores=stores, **dealt)
    maker = BatchMaker(data, contracts, seed=dealt["seed"])
    fields = tar_fields(data, images=maker.reads_images, captions=maker.reads_captions)
    urls = expand_streams(data.shards, allow_pipe=data.allow_pipe)
    return StreamLoader(
        TarStream(urls, seed=dealt["seed"], buffer=data.stream_buffer, **fields),
        maker,
        samples_per_epoch=data.num_samples,
        batch_size=rows_per_micro_batch(data, dealt["world_size"], dealt["accumulate"]),
        num_workers=data.num_workers,
        **dealt,
    )


def quantise_student(config: TrainConfig, student: Student, *, global_batch: int, device: torch.device) -> None:
    """Where `compress.int8` asks for it, let the image tower learn as int8; collective, after `fit_models`.

    Its ranges come from the first pictures of the data, whatever the ranks: every rank looks at all of them, and takes
    over what rank 0 found. Raises ConfigError.
    """
    name = config.compress.int8
    if name is None:
        return
    if "image" not in student.read:
        raise ConfigError("compress.int8 quantises the image tower, which the student lacks or no term reads: drop it")
    with distributed.failing_together():
        backend, wanted = int8.backend(name), student.contract.only({"image"})
        rows = min(CALIBRATION_ROWS, global_batch)
        data = config.data.model_copy(update={"batch_size": rows, "global_batch_size": None})
        dealt = {"seed": config.seed, "accumulate": 1, "rank": 0, "world_size": 1}
        with closing(iter(_loader(data, {"student": wanted}, dealt, stores={}))) as steps:
            views = [step[0].image.to(device) for step in islice(steps, CALIBRATION_SAMPLES // rows)]
        pixels = [to_model_input(view, wanted.image, torch.float32) for view in views]
        student.clip.visual = backend.insert(student.clip.visual.to(device), pixels)
    student.clip.visual.load_state_dict(distributed.from_main(student.clip.visual.state_dict()))
    student.int8 = name


def build_objective(config: TrainConfig, student: Student, teachers: Teachers, loader: TrainLoader) -> Objective:
    """For what these models and data are. Raises ConfigError for terms that do not fit them."""
    specs = {name: teacher.spec for name, teacher in teachers.items()}
    sizes = {"num_samples": loader.num_samples, "global_batch": loader.global_batch}
    check_fit(config.objective, widths=student.widths, teachers=specs, own_bias=student.scale.bias, **sizes)
    return Objective(
        config.objective,
        log_scale=student.scale.log_scale,
        logit_bias=student.scale.bias,
        teachers=specs,
        widths=student.widths,
        num_ids=loader.num_samples,
        class_embeddings=_class_embeddings(config, student, teachers),
        betas=config.optim.betas,
        eps=config.optim.eps,
    )


def remarks(config: TrainConfig, student: Student) -> list[str]:
    """What is not as the weights brought it, or not trained; a sentence each, for the log."""
    said, own, asked = [], student.scale, config.objective
    said += student.inherited
    if student.sparse is not None:
        said.append(student.sparse)
    if config.compress.int8 is not None:
        said.append(
            f"int8 by {config.compress.int8}: the image tower's ranges are those of the first pictures of the data"
        )
    if student.locked:
        said.append(f"frozen by student.lock: {', '.join(student.locked)}")
    if student.frozen:
        said.append(f"frozen, because no term of the objective reads what it says: {', '.join(student.frozen)}")
    if None not in (own.bias, asked.logit_bias) and not math.isclose(own.bias, asked.logit_bias, rel_tol=1e-6):
        said.append(f"objective.logit_bias={asked.logit_bias:g} replaces the student's own, {own.bias:g}")
    if normalises_over_batches(student):
        said.append("BatchNorm normalises over a process's micro-batch: results depend on data.batch_size")
    held = min(max(own.log_scale, 0.0), -math.log(asked.temperature.min))
    if asked.temperature.init is None and not math.isclose(own.log_scale, held, abs_tol=1e-6):
        said.append(
            f"the student's own temperature, {math.exp(-own.log_scale):.4g}, is held at {math.exp(-held):.4g}:"
            f" objective.temperature.min={asked.temperature.min:g}, and no temperature is above 1"
        )
    return said


def _class_embeddings(config: TrainConfig, student: Student, teachers: Teachers) -> dict[str, Tensor]:
    """[C, d] by the term that uses them. Raises ConfigError when they are not of the student's width."""
    found = {}
    for name, term in config.objective.terms.items():
        if not isinstance(term, LabelCE) or term.classes is None:
            continue
        key = f"objective.terms.{name}.classes"
        teacher = teachers.get(term.teacher or next(iter(teachers), None))
        if isinstance(teacher, StoredTeacher) and not term.classes.endswith(".safetensors"):
            raise ConfigError(
                f"{key}: class names are embedded by a live teacher, this one has placement=cached: embed them once,"
                f" kd-accel embed ... prompts={term.classes} out=classes.safetensors, and name that file"
            )
        found[name] = class_embeddings(term.classes, templates=term.templates, teacher=teacher, key=key)
        check_class_width(key, found[name], student.widths)
    return found
