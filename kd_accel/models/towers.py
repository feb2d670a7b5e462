"""Builds open_clip models: the towers, what they want as input, and their scale apart from them.

    model, contract, model_cfg, scale = build_open_clip("ViT-B-16", pretrained=None, preprocess=None, name="student")
    image_features = model.encode_image(to_model_input(view, contract.image, torch.float32))  # not normalised

`model_cfg` is open_clip's own description of the model, with a few keys of ours (model_cfg.py). The rules that turn it
into a module mirror open_clip.factory 3.3; nothing is registered with open_clip.
"""

from __future__ import annotations

import functools
from copy import deepcopy
from dataclasses import asdict, dataclass
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
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from kd_accel.models.hf_text import read_hf_tower
from kd_accel.models.model_cfg import (
    TOWER_KEYS,
    as_released,
    check_model_cfg,
    classifier_of,
    is_open_clips,
    named_config,
    skip_downloads,
)
from kd_accel.models.text import text_pad
from kd_accel.models.timm_towers import build_timm
from kd_accel.models.torchvision_towers import build_torchvision
from kd_accel.models.two_towers import CLIP_LOG_SCALE, TwoTowers
from kd_accel.schema import ConfigError
from kd_accel.sections import PreprocessConfig
from kd_accel.types import ImageInput, InputContract, TextInput

CLIP_BPE = "clip_bpe"  # the tokenizer that open_clip carries with it

_CLASSIFIERS = {"timm_classifier": build_timm, "torchvision_classifier": build_torchvision}


@dataclass(frozen=True)
class Scale:
    """How a model's cosines become logits: exp(log_scale) * cosine + bias."""

    log_scale: float
    bias: float | None  # None: no bias


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
        raise ConfigError(f"{where}: open_clip cannot build this model: {_one_line(error)}") from error


def input_contract(
    model: nn.Module, model_cfg: dict[str, Any], pixels: dict[str, Any], *, where: str, folder: Path | None = None
) -> InputContract:
    """What `model` wants to see.

    `pixels`: those of {mean, std, interpolation, resize_mode} that are not its package's; `folder`: where a release
    keeps a HuggingFace tokenizer. Raises ConfigError when the tokenizer cannot be had, or knows more tokens than the
    model.
    """
    image = _image_input(model, pixels) if "vision_cfg" in model_cfg else None
    text = getattr(model, "text_input", None)
    if "text_cfg" in model_cfg and text is None:
        text = _text_input(model_cfg["text_cfg"], folder, where)
    return InputContract(image, text)


def _image_input(model: nn.Module, given: dict[str, Any]) -> ImageInput:
    own = getattr(model, "image_input", None)
    size = model.visual.image_size if own is None else own.size
    pixels = merge_preprocess_dict(PreprocessCfg() if own is None else asdict(own), given)
    return ImageInput(
        size=(size, size) if isinstance(size, int) else tuple(size),
        mean=tuple(pixels["mean"]),
        std=tuple(pixels["std"]),
        interpolation="bilinear" if pixels["interpolation"] == "bilinear" else "bicubic",  # "random" is training's
        resize_mode=pixels["resize_mode"],
    )


def _text_input(text_cfg: dict[str, Any], folder: Path | None, where: str) -> TextInput:
    tokenize = _tokenizer(text_cfg, folder, where)
    return TextInput(tokenize.context_length, _tokenizer_name(text_cfg), tokenize, text_pad(text_cfg))


def take_scale(model: nn.Module) -> Scale:
    """Read logit_scale and logit_bias off an open_clip model and remove them from it."""
    # A bias of 0 is no bias; that is also what open_clip puts where the weights bring none.
    bias = None if model.logit_bias is None else model.logit_bias.item() or None
    scale = Scale(model.logit_scale.item(), bias)
    model.logit_scale = model.logit_bias = None
    odd = [name for name, p in model.named_parameters() if p.ndim == 0 or not p.is_contiguous()]
    assert not odd, f"DeepSpeed cannot prepare 0-dim or non-contiguous parameters: {odd}"
    return scale


def to_model_input(view: Tensor, wanted: ImageInput, dtype: torch.dtype) -> Tensor:
    """uint8 `view[b,3,H,W]` -> `[b,3,h,w]` on the same device: resized if need be, /255 and normalised in fp32."""
    if tuple(view.shape[-2:]) != wanted.size:
        view = resize(view, list(wanted.size), interpolation=InterpolationMode(wanted.interpolation), antialias=True)
    mean, std = (_per_channel(values, view.device) for values in (wanted.mean, wanted.std))
    return view.float().div_(255).sub_(mean).div_(std).to(dtype)  # in place: on CPU a quarter of the time


def encode_image(model: nn.Module, view: Tensor, wanted: ImageInput) -> Tensor:
    """uint8 `view[b,3,H,W]` -> raw embeddings `[b,d]` in the image tower's dtype."""
    # Asked of the parameters and not of their data: under ZeRO-3 the data is elsewhere.
    dtype = next(p.dtype for p in model.visual.parameters() if p.is_floating_point())  # others: int8 rows
    return model.encode_image(to_model_input(view, wanted, dtype), normalize=False)


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


def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[3, 1, 1], without making the host wait for the device."""
    return torch.tensor(values).view(-1, 1, 1).to(device, non_blocking=True)


# Weights --------------------------------------------------------------------------------------------------------------


def _weights_file(arch: str | dict, pretrained: str, tag: dict[str, Any], where: str) -> str:
    """The local file behind `pretrained`: a tag of `arch` (fetched, or found in the cache), or a path."""
    if tag:
        try:
            return download_pretrained(tag)
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"{where}: the weights '{pretrained}' of {arch} are not in the cache and cannot be fetched: fix the"
                f" network, or set {where} to a weights file on this machine ({_one_line(error)})"
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
        raise ConfigError(f"{where}: {file} does not hold weights of this architecture: {_one_line(error)}") from error


def _one_line(error: Exception, limit: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + " ..."


# Tokenizers -----------------------------------------------------------------------------------------------------------


def _tokenizer(text_cfg: dict[str, Any], folder: Path | None, where: str) -> SimpleTokenizer | HFTokenizer:
    """The tokenizer that open_clip.get_tokenizer chooses for this config: its BPE unless hf_tokenizer_name is set."""
    options = {"context_length": text_cfg.get("context_length", 77), **(text_cfg.get("tokenizer_kwargs") or {})}
    source = text_cfg.get("hf_tokenizer_name")
    if not source:
        tokenizer = _clip_bpe(**{key: tuple(v) if isinstance(v, list) else v for key, v in options.items()})
        vocab_size = text_cfg.get("vocab_size", tokenizer.vocab_size)
        if vocab_size < tokenizer.vocab_size:
            needed = tokenizer.vocab_size
            raise ConfigError(f"{where}.text_cfg.vocab_size={vocab_size}: CLIP's tokenizer needs {needed}")
        return tokenizer
    try:
        return HFTokenizer(str(folder or source), tokenizer_mode=text_cfg.get("tokenizer_mode"), **options)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{where}.text_cfg.hf_tokenizer_name: the tokenizer '{folder or source}' cannot be had: fix the network, or"
            f" name a folder on this machine ({_one_line(error)})"
        ) from error


@functools.cache
def _clip_bpe(**options: Any) -> SimpleTokenizer:
    """One for all models that want the same: to make it takes 0.1 s and as much memory as a small model."""
    return SimpleTokenizer(**options)


def _tokenizer_name(text_cfg: dict[str, Any]) -> str:
    """Equal for models whose captions become the same tokens at the same context length."""
    options = {"mode": text_cfg.get("tokenizer_mode"), **(text_cfg.get("tokenizer_kwargs") or {})}
    given = [f"{key}={value}" for key, value in sorted(options.items()) if value is not None]
    return " ".join([text_cfg.get("hf_tokenizer_name") or CLIP_BPE, *given])
