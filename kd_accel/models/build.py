"""From the `arch` of a config to a model: open_clip's names and configs, and models of other packages by a prefix.

ViT-B-16 | {embed_dim, vision_cfg, text_cfg}   open_clip: both towers, or one
timm/NAME  torchvision/NAME                    an image tower alone
hf/NAME                                        a text tower alone; for teachers also CLIP and SigLIP of transformers
sentence/NAME                                  teachers: a sentence-transformers model, word vectors too
ssl/LAYOUT                                     teachers: a ResNet from a self-supervised checkpoint
"""

from __future__ import annotations

from typing import Any

from torch import nn

from kd_accel.models.hf_clip import build_hf_clip, is_hf_clip
from kd_accel.models.hf_text import build_hf_text, hf_text_cfg
from kd_accel.models.release import read_release
from kd_accel.models.release_folder import resolve_release
from kd_accel.models.scale import Scale, take_scale
from kd_accel.models.sentence import build_sentence
from kd_accel.models.ssl_checkpoints import load_ssl
from kd_accel.models.timm_towers import build_timm
from kd_accel.models.torchvision_towers import build_torchvision
from kd_accel.models.towers import build_open_clip
from kd_accel.models.two_towers import TwoTowers
from kd_accel.schema import ConfigError
from kd_accel.sections import StudentConfig, TeacherConfig
from kd_accel.types import ImageInput, InputContract, TextInput

OWN_WEIGHTS = "default"  # student.pretrained: those that the package has for the name
LAYOUTS = ("auto", "moco", "simclr", "swav", "plain")

Built = tuple[nn.Module, InputContract, dict[str, Any], Scale]


def build_student(config: StudentConfig, *, teacher_width: int | None, weights: bool = True) -> Built:
    """(model, contract, model_cfg, scale) of `student`; fresh weights come from torch's global generator.

    `teacher_width`: what an embedding is as wide as where neither arch nor embed_dim says so; `weights`: false leaves
    pretrained ones out. Raises ConfigError.
    """
    prefix, _, name = config.arch.partition("/") if isinstance(config.arch, str) else ("", "", "")
    arch, pretrained = config.arch, config.pretrained
    if name:
        arch = _one_tower_cfg(prefix, name, config, teacher_width)
        pretrained = None if pretrained == OWN_WEIGHTS else pretrained
    elif config.embed_dim is not None:
        raise ConfigError("student.embed_dim: this architecture says itself how wide its embeddings are: drop it")
    given = {"pretrained": pretrained, "preprocess": config.preprocess, "name": "student"}
    return build_open_clip(arch, **given, weights=weights)


def _one_tower_cfg(prefix: str, name: str, config: StudentConfig, teacher_width: int | None) -> dict[str, Any]:
    width = config.embed_dim or teacher_width
    if width is None:
        raise ConfigError(f"student.embed_dim is needed with arch={config.arch}: there is no teacher to be as wide as")
    own = config.pretrained == OWN_WEIGHTS
    match prefix:
        case "timm" | "torchvision":
            size = {} if config.image_size is None else {"image_size": config.image_size}
            return {"embed_dim": width, "vision_cfg": {f"{prefix}_classifier": name, "pretrained": own, **size}}
        case "hf":
            return {"embed_dim": width, "text_cfg": _text_cfg(name, config) | {"hf_model_pretrained": own}}
    raise ConfigError(
        f"student.arch: {config.arch}: a student begins with timm/, torchvision/ or hf/, or is open_clip's"
    )


def _text_cfg(name: str, config: StudentConfig) -> dict[str, Any]:
    return hf_text_cfg(name, pooling=config.pooling, proj="linear", context_length=config.context_length)


def build_teacher(
    config: TeacherConfig, *, where: str, weights: bool = True
) -> tuple[nn.Module, InputContract, int, Scale]:
    """(model, contract, embed_dim, scale) of a teacher; raises ConfigError that begins with `where`.

    `weights`: false leaves those out that would have to be fetched.
    """
    if config.path is not None:
        try:
            release = resolve_release(config.path)
        except ConfigError as error:
            hint = f"; a model of open_clip is {where}.arch=ViT-B-32 {where}.pretrained=openai" * ("," in config.path)
            raise ConfigError(f"{where}.path: {error}{hint}") from None
        model, contract, model_cfg, scale = read_release(release, weights=weights)
        return model, contract, model_cfg["embed_dim"], scale
    prefix, _, name = config.arch.partition("/")
    if not name:
        named = {"pretrained": config.pretrained, "preprocess": None, "name": where}
        built = build_open_clip(config.arch, **named, weights=weights)
        model, contract, model_cfg, scale = built
        return model, contract, model_cfg["embed_dim"], scale
    at = f"{where}.arch"
    options = {"embed_dim": None, "pretrained": weights, "where": at}
    match prefix:
        case "timm":
            return _image_alone(*build_timm(name, **options))
        case "torchvision":
            return _image_alone(*build_torchvision(name, **options))
        case "ssl" if name in LAYOUTS:
            return _image_alone(*load_ssl(name, config.pretrained, output=config.output, where=f"{where}.pretrained"))
        case "hf" if is_hf_clip(name, where=at):
            return build_hf_clip(name, where=at, weights=weights)
        case "hf":
            text = {"proj": None, "pooling": config.pooling, "context_length": config.context_length}
            return _text_alone(*build_hf_text(name, **options | {"where": where}, **text))
        case "sentence":
            return _text_alone(*build_sentence(name, where=at))
    known = f"timm/, torchvision/, hf/, sentence/, {', '.join(f'ssl/{layout}' for layout in LAYOUTS)}"
    raise ConfigError(f"{at}: {config.arch}: no such kind of teacher; beside open_clip's names there are {known}")


def _image_alone(tower: nn.Module, wants: ImageInput) -> tuple[nn.Module, InputContract, int, Scale]:
    model = TwoTowers(tower, None, image_input=wants)
    return model, InputContract(wants, None), tower.embed_dim, take_scale(model)


def _text_alone(tower: nn.Module, wants: TextInput) -> tuple[nn.Module, InputContract, int, Scale]:
    model = TwoTowers(None, tower, text_input=wants)
    return model, InputContract(None, wants), tower.embed_dim, take_scale(model)
