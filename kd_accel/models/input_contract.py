"""What an open_clip model wants to see: its pixels, and the tokenizer that open_clip would choose for it."""

from __future__ import annotations

import functools
from dataclasses import asdict
from pathlib import Path
from typing import Any

from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import nn

from kd_accel.models.text import text_pad
from kd_accel.schema import ConfigError, one_line
from kd_accel.types import ImageInput, InputContract, TextInput

CLIP_BPE = "clip_bpe"  # the tokenizer that open_clip carries with it


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
            f" name a folder on this machine ({one_line(error)})"
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
