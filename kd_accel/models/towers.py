"""Builds open_clip models: the towers, what they want as input, and their scale apart from them.

    model, contract, model_cfg, scale = build_open_clip("ViT-B-16", pretrained=None, preprocess=None, name="student")
    image_features = encode_image(model, view, contract.image)  # not normalised; models/image.py

`model_cfg` is open_clip's own description of the model, with a few keys of ours (model_cfg.py). The rules that turn it
into a module mirror open_clip.factory 3.3; nothing is registered with open_clip.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from open_clip.factory import load_checkpoint
from open_clip.model import (
    CLIP,
    CustomTextCLIP,
    _build_text_tower,
    _build_vision_tower,
)
from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model
from torch import nn

from kd_accel.models.hf_text import read_hf_tower
from kd_accel.models.input_contract import input_contract
from kd_accel.models.model_cfg import (
    TOWER_KEYS,
    as_released,
    check_model_cfg,
    classifier_of,
    is_open_clips,
    named_config,
    skip_downloads,
)
from kd_accel.models.scale import Scale, take_scale
from kd_accel.models.timm_towers import build_timm
from kd_accel.models.torchvision_towers import build_torchvision
from kd_accel.models.two_towers import CLIP_LOG_SCALE, TwoTowers
from kd_accel.schema import ConfigError, one_line
from kd_accel.sections import PreprocessConfig
from kd_accel.types import InputContract

_CLASSIFIERS = {"timm_classifier": build_timm, "torchvision_classifier": build_torchvision}


def build_open_clip(
    arch: str | dict[str, Any],
    *,
    pretrained: str | None,
    preprocess: PreprocessConfig | None,
    name: str,
    weights: bool = True,
) -> tuple[nn.Module, InputContract, dict[str, Any], Scale]:
    """(model, contract, model_cfg, scale) of an open_clip architecture or of an inline model_cfg; the model is fp32.

    Fresh weights come from torch's global generator. The model has no logit_scale and logit_bias any more: DeepSpeed
    0.19.8 cannot prepare 0-dim parameters, and they train in fp32 elsewhere. `name` is the section of the config.
    `weights`: false leaves those of `pretrained` and of its parts out.
    Raises ConfigError for an unknown architecture, key, tag or file, for sizes that do not fit each other, and for
    weights that cannot be fetched or do not fit.
    """
    where = f"{name}.arch"
    # null drops a tower that a base file brought
    given = named_config(arch, where) if isinstance(arch, str) else deepcopy(arch)
    model_cfg = {key: value for key, value in given.items() if value is not None or key not in TOWER_KEYS}
    tag = get_pretrained_cfg(arch, pretrained) if isinstance(arch, str) and pretrained else {}
    if tag.get("quick_gelu"):
        model_cfg["quick_gelu"] = True  # open_clip would only warn, and the features would be wrong
    file = _weights_file(arch, pretrained, tag, f"{name}.pretrained") if pretrained and weights else None
    if not weights:
        skip_downloads(model_cfg)

    model = construct(model_cfg, where=where)
    as_released(model_cfg)  # from here on, the weights come with the model
    if file is not None:
        _load_weights(model, file, f"{name}.pretrained")
    contract = input_contract(model, model_cfg, preprocess.model_dump() if preprocess else tag, where=where)
    return model, contract, model_cfg, take_scale(model)


def construct(model_cfg: dict[str, Any], *, where: str, folder: Path | None = None) -> nn.Module:
    """The module that a model_cfg describes, with fresh fp32 weights and its scale parameters still in it.

    Towers of HuggingFace start from their own weights unless the config, or the `folder` of a release, says otherwise.
    Raises ConfigError, which begins with `where`, for unknown keys and for sizes that do not fit each other.
    """
    check_model_cfg(model_cfg, where)
    arguments = {key: value for key, value in model_cfg.items() if key != "custom_text"}
    try:
        if is_open_clips(model_cfg):
            return (CustomTextCLIP if model_cfg.get("custom_text", False) else CLIP)(**arguments)
        return _two_towers(model_cfg, where, folder)
    except ConfigError:
        raise
    except (ArithmeticError, AssertionError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: open_clip cannot build this model: {one_line(error)}") from error


def _two_towers(model_cfg: dict[str, Any], where: str, folder: Path | None) -> TwoTowers:
    vision_cfg, text_cfg, width = model_cfg.get("vision_cfg"), model_cfg.get("text_cfg"), model_cfg["embed_dim"]
    quick_gelu = model_cfg.get("quick_gelu", False)
    visual, text, inputs = None, None, {}
    if vision_cfg is not None and (kind := classifier_of(vision_cfg)):
        rest = {key: value for key, value in vision_cfg.items() if key not in (kind, "pretrained")}
        pretrained, at = vision_cfg.get("pretrained", False), f"{where}.vision_cfg.{kind}"
        build = _CLASSIFIERS[kind]
        visual, inputs["image_input"] = build(
            vision_cfg[kind], embed_dim=width, pretrained=pretrained, where=at, **rest
        )
    elif vision_cfg is not None:
        visual = _build_vision_tower(width, vision_cfg, quick_gelu)
    if text_cfg is not None and text_cfg.get("hf_model_name"):
        text, inputs["text_input"] = read_hf_tower(folder, text_cfg, embed_dim=width, where=f"{where}.text_cfg")
    elif text_cfg is not None:
        text = _build_text_tower(width, text_cfg, quick_gelu)
    scale, bias = model_cfg.get("init_logit_scale", CLIP_LOG_SCALE), model_cfg.get("init_logit_bias")
    return TwoTowers(visual, text, **inputs, log_scale=scale, bias=bias)


def _weights_file(arch: str | dict, pretrained: str, tag: dict[str, Any], where: str) -> str:
    """The local file behind `pretrained`: a tag of `arch` (fetched, or found in the cache), or a path."""
    if tag:
        try:
            return download_pretrained(tag)
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"{where}: the weights '{pretrained}' of {arch} are not in the cache and cannot be fetched: fix the"
                f" network, or set {where} to a weights file on this machine ({one_line(error)})"
            ) from error
    if Path(pretrained).is_file():
        return pretrained
    if not isinstance(arch, str):
        raise ConfigError(f"{where}: no such file: '{pretrained}' (an inline architecture has no tags)")
    tags = ", ".join(list_pretrained_tags_by_model(arch)) or "none"
    raise ConfigError(f"{where}: '{pretrained}' is neither a file nor a tag of {arch}; its tags: {tags}")


def _load_weights(model: nn.Module, file: str, where: str) -> None:
    """Load a weights file strictly; position embeddings of another image size or context length are interpolated."""
    if model.logit_bias is None:
        model.logit_bias = nn.Parameter(torch.zeros_like(model.logit_scale))  # room for one that the weights may bring
    try:
        load_checkpoint(model, file, strict=True, weights_only=True)
    except Exception as error:  # what a foreign file can raise in a dozen readers has no narrower base
        raise ConfigError(f"{where}: {file} does not hold weights of this architecture: {one_line(error)}") from error
