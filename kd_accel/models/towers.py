"""Builds open_clip models: the towers, what they want as input, and their scale apart from them.

    model, contract, model_cfg, scale = build_open_clip("ViT-B-16", pretrained=None, preprocess=None, name="student")
    image_features = model.encode_image(to_model_input(view, contract.image, torch.float32))  # not normalised

`model_cfg` is open_clip's own description of the model, {embed_dim, vision_cfg, text_cfg, ...}: it names an
architecture, stands inline in a YAML, and lies in a release, and means the same in all three. The rules that turn it
into a module mirror open_clip.factory 3.3; nothing is registered with open_clip.
"""

from __future__ import annotations

import difflib
import inspect
from copy import deepcopy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import get_model_config, load_checkpoint
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from kd_accel.models.two_towers import TwoTowers
from kd_accel.schema import ConfigError
from kd_accel.sections import PreprocessConfig
from kd_accel.types import ImageInput, InputContract, TextInput

CLIP_BPE = "clip_bpe"  # the tokenizer that open_clip carries with it

# Keys of a model_cfg. Towers that return tokens beside the embedding are CoCa's, and those are refused.
_TOP_KEYS = {*inspect.signature(CLIP).parameters, "custom_text"} - {"cast_dtype", "output_dict"}
_TOWER_KEYS = {
    "vision_cfg": {field.name for field in fields(CLIPVisionCfg)} - {"output_tokens"},
    "text_cfg": {field.name for field in fields(CLIPTextCfg)} - {"output_tokens"},
}


@dataclass(frozen=True)
class Scale:
    """How a model's cosines become logits: exp(log_scale) * cosine + bias."""

    log_scale: float
    bias: float | None  # None: no bias


def build_open_clip(
    arch: str | dict[str, Any], *, pretrained: str | None, preprocess: PreprocessConfig | None, name: str
) -> tuple[nn.Module, InputContract, dict[str, Any], Scale]:
    """(model, contract, model_cfg, scale) of an open_clip architecture or of an inline model_cfg; the model is fp32.

    Fresh weights come from torch's global generator. The model has no logit_scale and logit_bias any more: DeepSpeed
    0.19.8 cannot prepare 0-dim parameters, and they train in fp32 elsewhere. `name` is the section of the config.
    Raises ConfigError for an unknown architecture, key, tag or file, for sizes that do not fit each other, and for
    weights that cannot be fetched or do not fit.
    """
    where = f"{name}.arch"
    model_cfg = _named_config(arch, where) if isinstance(arch, str) else deepcopy(arch)
    tag = get_pretrained_cfg(arch, pretrained) if isinstance(arch, str) and pretrained else {}
    if tag.get("quick_gelu"):
        model_cfg["quick_gelu"] = True  # open_clip would only warn, and the features would be wrong
    file = None if pretrained is None else _weights_file(arch, pretrained, tag, f"{name}.pretrained")

    model = construct(model_cfg, where=where)
    skip_timm_download(model_cfg)  # from here on, the weights come with the model
    if file is not None:
        _load_weights(model, file, f"{name}.pretrained")
    pixels = merge_preprocess_dict(PreprocessCfg(), tag) if preprocess is None else preprocess.model_dump()
    contract = input_contract(model, model_cfg, pixels, where=where)
    return model, contract, model_cfg, take_scale(model)


def construct(model_cfg: dict[str, Any], *, where: str) -> nn.Module:
    """The module that a model_cfg describes, with fresh fp32 weights and its scale parameters still in it.

    Raises ConfigError, which begins with `where`, for unknown keys and for sizes that do not fit each other.
    """
    check_model_cfg(model_cfg, where)
    arguments = {key: value for key, value in model_cfg.items() if key != "custom_text"}
    try:
        if not all(tower in model_cfg for tower in _TOWER_KEYS):
            return TwoTowers(**arguments)
        custom = model_cfg.get("custom_text", False) or "hf_model_name" in model_cfg["text_cfg"]
        return (CustomTextCLIP if custom else CLIP)(**arguments)
    except (ArithmeticError, AssertionError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: open_clip cannot build this model: {_one_line(error)}") from error


def input_contract(
    model: nn.Module, model_cfg: dict[str, Any], pixels: dict[str, Any], *, where: str, folder: Path | None = None
) -> InputContract:
    """What `model` wants to see. `pixels`: {mean, std, interpolation, resize_mode}; `folder`: where a release keeps a
    HuggingFace tokenizer. Raises ConfigError when the tokenizer cannot be had, or knows more tokens than the model."""
    image = _image_input(model.visual.image_size, pixels) if "vision_cfg" in model_cfg else None
    text = _text_input(model_cfg["text_cfg"], folder, where) if "text_cfg" in model_cfg else None
    return InputContract(image, text)


def _image_input(size: int | tuple[int, int], pixels: dict[str, Any]) -> ImageInput:
    return ImageInput(
        size=(size, size) if isinstance(size, int) else tuple(size),
        mean=tuple(pixels["mean"]),
        std=tuple(pixels["std"]),
        interpolation="bilinear" if pixels["interpolation"] == "bilinear" else "bicubic",  # "random" is training's
        resize_mode=pixels["resize_mode"],
    )


def _text_input(text_cfg: dict[str, Any], folder: Path | None, where: str) -> TextInput:
    tokenize = _tokenizer(text_cfg, folder, where)
    return TextInput(tokenize.context_length, _tokenizer_name(text_cfg), tokenize, pad=None)


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
    return ((view.float() / 255 - mean) / std).to(dtype)


def encode_image(model: nn.Module, view: Tensor, wanted: ImageInput) -> Tensor:
    """uint8 `view[b,3,H,W]` -> raw embeddings `[b,d]` in the image tower's dtype."""
    # Asked of the parameters and not of their data: under ZeRO-3 the data is elsewhere.
    dtype = next(model.visual.parameters()).dtype
    return model.encode_image(to_model_input(view, wanted, dtype), normalize=False)


def skip_timm_download(model_cfg: dict[str, Any]) -> None:
    """Let a timm tower start without timm's own weights, whatever its config says: as open_clip does by default."""
    if "timm_model_name" in model_cfg.get("vision_cfg", {}):
        model_cfg["vision_cfg"]["timm_model_pretrained"] = False


def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[3, 1, 1], without making the host wait for the device."""
    return torch.tensor(values).view(-1, 1, 1).to(device, non_blocking=True)


# Configs --------------------------------------------------------------------------------------------------------------


def check_model_cfg(model_cfg: dict[str, Any], where: str) -> None:
    """Raises ConfigError for an unknown or missing key, and for sizes that do not fit each other."""
    _check_keys(model_cfg, where)
    if "vision_cfg" in model_cfg:
        _check_vision(model_cfg["vision_cfg"], f"{where}.vision_cfg")
    text_cfg = model_cfg.get("text_cfg", {})
    if text_cfg and not text_cfg.get("hf_model_name"):
        text = CLIPTextCfg(**text_cfg)
        _check_multiple(text.width, f"{where}.text_cfg.width", text.heads, "heads")
    if text_cfg.get("embed_cls") and not (model_cfg.get("custom_text") or text_cfg.get("hf_model_name")):
        raise ConfigError(f"{where}.text_cfg.embed_cls: needs custom_text: true beside text_cfg")


def _named_config(arch: str, where: str) -> dict[str, Any]:
    """open_clip's model_cfg of a named architecture."""
    known = open_clip.list_models()
    if arch not in known:
        near = difflib.get_close_matches(arch, known, n=3, cutoff=0.4)
        hint = f"; did you mean {', '.join(near)}?" if near else "; open_clip.list_models() lists them"
        raise ConfigError(f"{where}: unknown architecture '{arch}'{hint}")
    model_cfg = get_model_config(arch)
    if "multimodal_cfg" in model_cfg:
        raise ConfigError(f"{where}: '{arch}' is a CoCa, which is more than two towers: choose a CLIP architecture")
    skip_timm_download(model_cfg)
    return model_cfg


def _check_keys(model_cfg: dict[str, Any], where: str) -> None:
    if "embed_dim" not in model_cfg or not _TOWER_KEYS.keys() & model_cfg.keys():
        raise ConfigError(f"{where}: embed_dim is needed, and vision_cfg, text_cfg or both")
    _refuse_unknown(model_cfg, _TOP_KEYS, where)
    for tower in _TOWER_KEYS.keys() & model_cfg.keys():
        known = _TOWER_KEYS[tower]
        if not isinstance(model_cfg[tower], dict):
            raise ConfigError(f"{where}.{tower}: expected a mapping, got {model_cfg[tower]!r}")
        _refuse_unknown(model_cfg[tower], known, f"{where}.{tower}")


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
        tokenizer = SimpleTokenizer(**options)
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


def _tokenizer_name(text_cfg: dict[str, Any]) -> str:
    """Equal for models whose captions become the same tokens at the same context length."""
    options = {"mode": text_cfg.get("tokenizer_mode"), **(text_cfg.get("tokenizer_kwargs") or {})}
    given = [f"{key}={value}" for key, value in sorted(options.items()) if value is not None]
    return " ".join([text_cfg.get("hf_tokenizer_name") or CLIP_BPE, *given])
