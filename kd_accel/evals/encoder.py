"""What can be evaluated, by the name that it has on the command line, as an image tower and a text tower.

    load_encoder("runs/student")                                 a run, a checkpoint, a release
    load_encoder("ViT-B-32,openai")                              open_clip's ARCH,PRETRAINED
    load_encoder("hf/openai/clip-vit-base-patch32")              and the other kinds of teachers: models/build.py
    load_encoder("exported/")                                    ONNX: meta.json with image.onnx, text.onnx
    load_encoder("runs/image", text_from="runs/text")            towers of two models
    load_encoder("runs/image", text_from="run")                  the text tower of the run's teacher
    load_encoder("runs/image", text_from="embeddings.npy")       stored texts
    load_encoder("runs/a", ensemble=["runs/b"])                  the mean of several models' cosines

b rows of a batch, d embedding width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_accel.evals.ensemble import Ensemble
from kd_accel.evals.model_towers import ImageTower, ModelImages, ModelTexts, TextTower
from kd_accel.evals.onnx_encoder import is_onnx, open_onnx
from kd_accel.evals.run_teachers import TEACHER, teacher_called, teachers_of_run
from kd_accel.evals.stored_texts import SUFFIXES, StoredTexts
from kd_accel.models.build import build_teacher
from kd_accel.models.class_head import FILE as CLASS_HEAD
from kd_accel.models.class_head import ClassHead, read_class_head
from kd_accel.models.device import DTYPES, own_device
from kd_accel.models.release import read_release
from kd_accel.models.release_folder import resolve_release, run_and_step
from kd_accel.schema import ConfigError, validate
from kd_accel.sections import TeacherConfig
from kd_accel.types import ImageInput, InputContract

FORMS = (
    "a run, a checkpoint or a release directory; ARCH,PRETRAINED of open_clip; hf/NAME, timm/NAME, torchvision/NAME,"
    " sentence/NAME or ssl/LAYOUT,FILE; a folder with meta.json and .onnx files; for text_from stored texts too, .npy"
    " or .safetensors"
)

Teachers = Mapping[str, TeacherConfig]  # by name

_PACKAGES = ("hf", "timm", "torchvision", "sentence")  # that bring weights with a name


@dataclass(frozen=True)
class Encoder:
    """The towers of one model, or of two, on this rank's device and in eval mode."""

    name: str  # goes into every row
    step: int | None  # of the checkpoint that it comes from
    home: Path  # where its results.jsonl belongs: the run, the release, or a folder under evals/
    image: ImageTower | None
    text: TextTower | None
    class_head: ClassHead | None = None  # of the image tower

    @property
    def title(self) -> str:
        """For people: its name, and the step where it has one."""
        return self.name if self.step is None else f"{self.name}, step {self.step:,}"

    @property
    def members(self) -> tuple[Encoder, ...]:
        """Itself: see Ensemble."""
        return (self,)

    @property
    def towers(self) -> set[str]:
        """Of "image" and "text" those that it has."""
        return {name for name in ("image", "text") if getattr(self, name) is not None}

    @property
    def embed_dim(self) -> int:
        """d."""
        return (self.image or self.text).embed_dim

    @property
    def device(self) -> torch.device:
        """Where its features are."""
        return (self.image or self.text).device

    @property
    def image_input(self) -> ImageInput:
        """What its views are made by; raises ConfigError without an image tower."""
        self.require("image")
        return self.image.wants

    @property
    def image_id(self) -> str:
        """SHA-256 of what decides image features: weights, preprocessing, precision; empty without such a tower."""
        return "" if self.image is None else self.image.id

    @property
    def text_id(self) -> str:
        """SHA-256 of what decides text features: weights, tokenizer, precision; empty without such a tower."""
        return "" if self.text is None else self.text.id

    def require(self, *towers: str) -> None:
        """Raises ConfigError that says how to come by them where one of `towers` ("image", "text") is missing."""
        for tower in towers:
            if getattr(self, tower) is None:
                raise ConfigError(
                    f"{self.title} has no {tower} tower: take another model's with {tower}_from=MODEL"
                    + _hint(self, tower)
                )

    def check_texts(self, texts: list[str]) -> None:
        """Raises ConfigError for texts that it cannot encode; ask for all of them, on every rank."""
        self.require("text")
        self.text.check(texts)

    def templates(self, class_names: tuple[str, ...], templates: tuple[str, ...]) -> tuple[str, ...]:
        """Of `templates` those to use: all of them, but for stored embeddings of the class names alone."""
        self.require("text")
        return self.text.templates(class_names, templates)

    def encode_images(self, views: Tensor) -> Tensor:
        """[b, 3, H, W] uint8 views made by eval_view(image, image_input), on any device -> raw [b, d] fp32."""
        self.require("image")
        return self.image(views)

    def encode_texts(self, texts: list[str]) -> Tensor:
        """b texts -> raw [b, d] fp32."""
        self.require("text")
        return self.text(texts)

    def unit(self, features: Tensor) -> Tensor:
        """Raw [..., d] -> unit rows; cosines are their dot products."""
        return F.normalize(features, dim=-1)


def load_encoder(
    model: str | Path,
    *,
    image_from: str | None = None,
    text_from: str | None = None,
    ensemble: tuple[str, ...] | list[str] = (),
    precision: str = "fp32",
) -> Encoder | Ensemble:
    """The encoder that the names stand for (see above), on the GPU where there is one. Torch's generator is left alone.

    Raises ConfigError for names that stand for nothing, files that are damaged, and towers that do not fit each other.
    """
    encoder = _open(str(model), "model", precision)
    for tower, source in (("image", image_from), ("text", text_from)):
        if source is not None:
            encoder = with_tower(encoder, tower, source, precision=precision)
    others = [_open(name, "ensemble", precision) for name in ensemble]
    return Ensemble((encoder, *others)) if others else encoder


def load_teacher(teacher: str, *, student: Encoder | Ensemble, precision: str = "fp32") -> Encoder:
    """The model of this name; "run" is the teacher in the config.yaml of the student's run. Raises ConfigError."""
    return _open(teacher, "teacher", precision, student.home)


def model_encoder(
    model: nn.Module,
    wants: InputContract,
    embed_dim: int,
    *,
    name: str,
    home: Path,
    step: int | None = None,
    precision: str = "fp32",
) -> Encoder:
    """The towers that `model` has, moved to the GPU where there is one; `precision` is theirs from then on."""
    model = model.to(own_device(), DTYPES[precision]).eval()
    image = None if wants.image is None else ModelImages(model, wants.image, embed_dim)
    text = None if wants.text is None else ModelTexts(model, wants.text, embed_dim)
    return Encoder(name, step, home, image, text)


def with_tower(
    encoder: Encoder, tower: str, source: str, *, precision: str = "fp32", teachers: Teachers | None = None
) -> Encoder:
    """`encoder` with its image or text tower replaced by that of `source`; "run" is one of `teachers`, or of its run's.

    Raises ConfigError for names that stand for nothing, and for a tower that does not fit the other one.
    """
    key = f"{tower}_from"
    other = _open(source, key, precision, encoder.home if teachers is None else teachers)
    if (found := getattr(other, tower)) is None:
        raise ConfigError(f"{key}={source}: {other.title} has no {tower} tower")
    taken = {tower: found} | ({"class_head": other.class_head} if tower == "image" else {})
    joined = replace(encoder, name=f"{encoder.name}, {tower} of {other.name}", **taken)
    if joined.image and joined.text and joined.image.embed_dim != joined.text.embed_dim:
        raise ConfigError(
            f"{key}={source}: its {tower} embeddings are {found.embed_dim} wide, those of the other tower, of"
            f" {encoder.title}, {getattr(encoder, 'image' if tower == 'text' else 'text').embed_dim}"
        )
    return joined


def _hint(encoder: Encoder, tower: str) -> str:
    """How the run's teacher can help out, if it can."""
    try:
        named = teachers_of_run(encoder.home, f"{tower}_from")
        teachers = {name: _taught(config, f"{tower}_from", "fp32") for name, config in named.items()}
    except ConfigError:
        return ""  # no run, or its teacher is not to be had
    fitting = [name for name, t in teachers.items() if getattr(t, tower) and t.embed_dim == encoder.embed_dim]
    if not fitting:
        return ""
    key = TEACHER if len(teachers) == 1 else f"{TEACHER}:{fitting[0]}"
    return f"; {tower}_from={key} is that of its teacher, {teachers[fitting[0]].name}, which is as wide"


# From a name to towers ------------------------------------------------------------------------------------------------


def _open(text: str, key: str, precision: str, run: Path | Teachers | None = None) -> Encoder:
    """What `key`=`text` names; `run`: the teachers that "run" means, or the run whose config.yaml has them."""
    path = Path(text)
    word, _, name = text.partition(":")
    if run is not None and word == TEACHER:
        given = f"{key}={text}"
        teachers = teachers_of_run(run, given) if isinstance(run, Path) else run
        return _taught(teacher_called(name, teachers, given), key, precision)
    if is_onnx(path):
        meta, image, text_tower = open_onnx(path, own_device())
        home = path if path.is_dir() else path.parent
        head = _class_head(home / meta.class_head, image) if meta.class_head else None
        return Encoder(meta.name, None, home, image, text_tower, head)
    if path.is_file() and path.suffix in SUFFIXES:
        return Encoder(path.stem, None, path.parent, None, StoredTexts.read(path, own_device()))
    if path.is_dir():
        return _released(path, precision)
    arch, comma, pretrained = text.partition(",")
    if not comma and arch.partition("/")[0] not in _PACKAGES:
        raise ConfigError(f"{key}={text}: no such file or directory, nor a model's name; give {FORMS}")
    values = {"arch": arch} | ({"pretrained": pretrained} if comma else {})
    return _taught(validate(TeacherConfig, values), key, precision)


def _released(path: Path, precision: str) -> Encoder:
    release = resolve_release(str(path)).resolve()
    with torch.random.fork_rng(devices=[]):
        model, contract, model_cfg, _ = read_release(release)
    name, step, home = _origin(release)
    found = model_encoder(model, contract, model_cfg["embed_dim"], name=name, step=step, home=home, precision=precision)
    head = release / CLASS_HEAD
    return replace(found, class_head=_class_head(head, found.image)) if head.is_file() else found


def _class_head(file: Path, image: ImageTower | None) -> ClassHead | None:
    """That of the image tower, where there is one."""
    return None if image is None else read_class_head(file, image.embed_dim)


def _taught(config: TeacherConfig, key: str, precision: str) -> Encoder:
    """A teacher as training builds it."""
    if config.path is not None:
        try:
            return _released(Path(config.path), precision)
        except ConfigError as error:
            raise ConfigError(f"{key}: its config.yaml names a teacher that is not to be had: {error}") from None
    if config.arch is None:
        raise ConfigError(
            f"{key}: of its teacher the run has only the features in {config.store}: name the model itself"
        )
    with torch.random.fork_rng(devices=[]):
        model, contract, embed_dim, _ = build_teacher(config, where=key)
    name = ",".join(filter(None, (config.arch, config.pretrained)))
    home = Path("evals", re.sub(r"[^\w.\-]+", "_", name))
    return model_encoder(model, contract, embed_dim, name=name, home=home, precision=precision)


def _origin(release: Path) -> tuple[str, int | None, Path]:
    """(name, step, home) of a release: RUN/checkpoints/step_00001000/student belongs to the run."""
    if (found := run_and_step(release)) is None:
        return release.name, None, release
    run, step = found
    return run.name, step, run
