"""open_clip's description of a model, {embed_dim, vision_cfg, text_cfg, ...}, and what we add to it.

It names an architecture, stands inline in a YAML, and lies in a release, and means the same in all three. Ours are

    vision_cfg: {timm_classifier | torchvision_classifier: NAME, image_size, pretrained}   the last layer embeds
    text_cfg:   {hf_model_name: NAME, hf_config: {...}}                                    our tower, any text encoder
    a model without vision_cfg, or without text_cfg                                        one tower alone
"""

from __future__ import annotations

import difflib
import inspect
from dataclasses import fields
from typing import Any

import open_clip
from open_clip.factory import get_model_config
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

from kd_accel.schema import ConfigError

CLASSIFIERS = ("timm_classifier", "torchvision_classifier")
# Keys of a model_cfg. Towers that return tokens beside the embedding are CoCa's, and those are refused.
_TOP_KEYS = {*inspect.signature(CLIP).parameters, "custom_text"} - {"cast_dtype", "output_dict"}
TOWER_KEYS = {
    "vision_cfg": {field.name for field in fields(CLIPVisionCfg)} - {"output_tokens"},
    "text_cfg": {field.name for field in fields(CLIPTextCfg)} - {"output_tokens"} | {"hf_config"},
}


def check_model_cfg(model_cfg: dict[str, Any], where: str) -> None:
    """Raises ConfigError for an unknown or missing key, and for sizes that do not fit each other."""
    _check_keys(model_cfg, where)
    if "vision_cfg" in model_cfg and not classifier_of(model_cfg["vision_cfg"]):
        _check_vision(model_cfg["vision_cfg"], f"{where}.vision_cfg")
    text_cfg = model_cfg.get("text_cfg", {})
    if text_cfg and not text_cfg.get("hf_model_name"):
        text = CLIPTextCfg(**text_cfg)
        _check_multiple(text.width, f"{where}.text_cfg.width", text.heads, "heads")
    if text_cfg.get("embed_cls") and not (model_cfg.get("custom_text") or text_cfg.get("hf_model_name")):
        raise ConfigError(f"{where}.text_cfg.embed_cls: needs custom_text: true beside text_cfg")


def named_config(arch: str, where: str) -> dict[str, Any]:
    """open_clip's model_cfg of a named architecture."""
    known = open_clip.list_models()
    if arch not in known:
        near = difflib.get_close_matches(arch, known, n=3, cutoff=0.4)
        hint = f"; did you mean {', '.join(near)}?" if near else "; open_clip.list_models() lists them"
        raise ConfigError(f"{where}: unknown architecture '{arch}'{hint}")
    model_cfg = get_model_config(arch)
    if "multimodal_cfg" in model_cfg:
        raise ConfigError(f"{where}: '{arch}' is a CoCa, which is more than two towers: choose a CLIP architecture")
    if "timm_model_name" in model_cfg["vision_cfg"]:
        model_cfg["vision_cfg"]["timm_model_pretrained"] = False  # as in open_clip
    return model_cfg


def _check_keys(model_cfg: dict[str, Any], where: str) -> None:
    if "embed_dim" not in model_cfg or not TOWER_KEYS.keys() & model_cfg.keys():
        raise ConfigError(f"{where}: embed_dim is needed, and vision_cfg, text_cfg or both")
    _refuse_unknown(model_cfg, _TOP_KEYS, where)
    for tower in TOWER_KEYS.keys() & model_cfg.keys():
        known = TOWER_KEYS[tower]
        if not isinstance(model_cfg[tower], dict):
            raise ConfigError(f"{where}.{tower}: expected a mapping, got {model_cfg[tower]!r}")
        ours = classifier_of(model_cfg[tower])
        _refuse_unknown(model_cfg[tower], {ours, "pretrained", "image_size"} if ours else known, f"{where}.{tower}")


def _refuse_unknown(given: dict[str, Any], known: set[str], where: str) -> None:
    for key in given.keys() - known:
        near = difflib.get_close_matches(str(key), known, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else f"; known are {', '.join(sorted(known))}"
        raise ConfigError(f"{where}.{key}: unknown key{hint}")


def _check_vision(vision_cfg: dict[str, Any], where: str) -> None:
    """What open_clip would round down without a word, or refuse in words of its own."""
    vision = CLIPVisionCfg(**vision_cfg)
    if vision.timm_model_name:
        return
    sides = vision.image_size if isinstance(vision.image_size, list | tuple) else [vision.image_size]
    resnet = isinstance(vision.layers, list | tuple)
    for side in sides:
        step, its_name = (32, "the ResNet's stride") if resnet else (vision.patch_size, "patch_size")
        _check_multiple(side, f"{where}.image_size", step, its_name)
    width = vision.width * 32 if resnet else vision.width  # a ResNet pools over its last, 32 times wider map
    _check_multiple(width, f"{where}.width", vision.head_width, "head_width")


def _check_multiple(value: Any, key: str, divisor: Any, its_name: str) -> None:
    if not all(isinstance(number, int) and number > 0 for number in (value, divisor)):
        raise ConfigError(f"{key}={value!r} and {its_name}={divisor!r}: positive whole numbers are needed")
    if value % divisor:
        raise ConfigError(f"{key}={value} is not a multiple of {its_name}={divisor}: change one of them")


def skip_downloads(model_cfg: dict[str, Any]) -> None:
    """Let towers of other packages start without those packages' weights, whatever the config says."""
    vision_cfg, text_cfg = model_cfg.get("vision_cfg", {}), model_cfg.get("text_cfg", {})
    if "timm_model_name" in vision_cfg:
        vision_cfg["timm_model_pretrained"] = False
    vision_cfg.pop("pretrained", None)
    if "hf_model_name" in text_cfg:
        text_cfg["hf_model_pretrained"] = False


def as_released(model_cfg: dict[str, Any]) -> None:
    """Let a release build its towers by itself: its weights and its config.json lie beside it."""
    skip_downloads(model_cfg)
    model_cfg.get("text_cfg", {}).pop("hf_config", None)


def is_open_clips(model_cfg: dict[str, Any]) -> bool:
    """Whether open_clip itself builds this model: both towers, and neither of them one of ours."""
    whole = all(tower in model_cfg for tower in TOWER_KEYS)
    return whole and not classifier_of(model_cfg["vision_cfg"]) and not model_cfg["text_cfg"].get("hf_model_name")


def classifier_of(vision_cfg: dict[str, Any]) -> str | None:
    """Which of CLASSIFIERS makes the image tower; None for open_clip's own towers."""
    return next((key for key in CLASSIFIERS if key in vision_cfg), None)
