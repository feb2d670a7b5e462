"""A release is a directory in open_clip's format: what a checkpoint keeps as student/, and what goes to the Hub.

    open_clip_config.json          {"model_cfg": ..., "preprocess_cfg": ...}
    open_clip_model.safetensors    fp32, with logit_scale and, for sigmoid losses, logit_bias
    vocab.json merges.txt tokenizer.json tokenizer_config.json
    int8.safetensors               of a student that was trained as int8: int8_state.py
    class_head.safetensors         of a student that was trained with one (models/class_head.py)

    open_clip.create_model_and_transforms("local-dir:DIRECTORY"); open_clip.get_tokenizer("local-dir:DIRECTORY")

The tokenizer files are for transformers. open_clip does not look at them unless text_cfg has hf_tokenizer_name: with
CLIP's BPE it uses the one that it carries, so tokens are those of the training.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kd_accel.models.class_head import ClassHead, write_class_head
from kd_accel.models.hf_text import HFTextTower, write_hf_tower
from kd_accel.models.input_contract import CLIP_BPE, input_contract
from kd_accel.models.int8_state import Int8State, write_int8
from kd_accel.models.model_cfg import as_released
from kd_accel.models.release_folder import CONFIG, WEIGHTS
from kd_accel.models.scale import Scale, take_scale
from kd_accel.models.towers import construct
from kd_accel.schema import ConfigError
from kd_accel.types import ImageInput, InputContract, TextInput


def write_release(
    directory: Path,
    *,
    state: dict[str, Tensor],
    model_cfg: dict[str, Any],
    contract: InputContract,
    log_scale: float,
    logit_bias: float | None,
    hf_text: HFTextTower | None = None,
    int8: Int8State | None = None,
    class_head: ClassHead | None = None,
) -> None:
    """Write `directory`, which must not exist yet: complete or not at all.

    `state` is the open_clip state without its scales; floating-point tensors are written as fp32. Of a text tower of
    HuggingFace, `hf_text`, the config.json lies beside them; of a quantised image tower what its quantisers hold,
    `int8`.
    """
    assert not directory.exists(), f"{directory} is already there"
    partial = directory.with_name(f".partial_{directory.name}")
    if partial.exists():
        shutil.rmtree(partial)  # left by a process that was killed
    partial.mkdir(parents=True)
    scales = {"logit_scale": log_scale} | ({} if logit_bias is None else {"logit_bias": logit_bias})
    weights = state | {key: torch.tensor(value) for key, value in scales.items()}
    save_file({key: _storable(tensor) for key, tensor in weights.items()}, partial / WEIGHTS, metadata={"format": "pt"})
    config = {"model_cfg": _with_bias(model_cfg, logit_bias), "preprocess_cfg": _preprocess_cfg(contract.image)}
    (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if class_head is not None:
        write_class_head(partial, class_head)
    if hf_text is not None:
        write_hf_tower(hf_text, contract.text, partial)
    else:
        _write_tokenizer(partial, contract.text)
    if int8 is not None:
        write_int8(int8, partial)
    os.rename(partial, directory)


def read_release(directory: Path, *, weights: bool = True) -> tuple[nn.Module, InputContract, dict[str, Any], Scale]:
    """(model in eval mode, contract, model_cfg, scale) of a release; its weights are safetensors, and fit to the key.

    `weights`: false leaves fresh ones in. Raises ConfigError, one line, for a missing or damaged file, a pickle, and
    weights of another model.
    """
    config = _read_config(directory / CONFIG)
    model_cfg = config["model_cfg"]
    as_released(model_cfg)
    where = f"{directory / CONFIG}: model_cfg"
    state = _read_weights(directory / WEIGHTS) if weights else None
    model = construct(model_cfg, where=where, folder=directory)
    if state is not None:
        _fill(model, state, directory / WEIGHTS)
    contract = input_contract(model, model_cfg, config.get("preprocess_cfg", {}), where=where, folder=directory)
    return model.eval(), contract, model_cfg, take_scale(model)


# Writing --------------------------------------------------------------------------------------------------------------


def _storable(tensor: Tensor) -> Tensor:
    """fp32 unless it counts something (BatchNorm's num_batches_tracked)."""
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous()


def _with_bias(model_cfg: dict[str, Any], logit_bias: float | None) -> dict[str, Any]:
    """open_clip makes a logit_bias, and then wants one in the weights, where init_logit_bias is given."""
    without = {k: v for k, v in model_cfg.items() if k not in ("init_logit_bias", "nonscalar_logit_scale")}
    return without if logit_bias is None else without | {"init_logit_bias": logit_bias}


def _preprocess_cfg(image: ImageInput | None) -> dict[str, Any]:
    """open_clip's four keys; the size it takes from the model."""
    keys = () if image is None else ("mean", "std", "interpolation", "resize_mode")
    return {key: getattr(image, key) for key in keys}


def _write_tokenizer(directory: Path, text: TextInput | None) -> None:
    """The tokenizer as transformers reads it; without network, since open_clip carries CLIP's vocabulary."""
    if text is None:
        return
    if isinstance(text.tokenize, HFTokenizer):
        text.tokenize.save_pretrained(directory)
    elif text.tokenizer == CLIP_BPE:
        _write_clip_bpe(directory, text.tokenize)


def _write_clip_bpe(directory: Path, tokenizer: SimpleTokenizer) -> None:
    from transformers import CLIPTokenizer  # takes a second to import, and training starts without it

    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {names.get(token, token): index for token, index in tokenizer.encoder.items()}
    merges = [" ".join(pair) for pair in sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)]
    (directory / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    CLIPTokenizer(
        str(directory / "vocab.json"), str(directory / "merges.txt"), model_max_length=tokenizer.context_length
    ).save_pretrained(directory)


# Reading --------------------------------------------------------------------------------------------------------------


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; a release has it beside {WEIGHTS}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    if not (isinstance(config, dict) and isinstance(config.get("model_cfg"), dict)):
        raise ConfigError(f'{file}: expected {{"model_cfg": {{...}}, "preprocess_cfg": {{...}}}}')
    return config


def _read_weights(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        others = [f.name for f in sorted(file.parent.iterdir()) if f.suffix in (".bin", ".pt", ".pth")]
        hint = f"; {others[0]} is a pickle, which may run code: convert it to safetensors" if others else ""
        raise ConfigError(f"{file}: no such file, so the release has no weights{hint}")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file}: truncated, or not safetensors: {error}") from None


def _fill(model: nn.Module, weights: dict[str, Tensor], file: Path) -> None:
    """Every key on both sides, every shape alike."""
    wanted = model.state_dict()
    for what, keys in (("lack", wanted.keys() - weights.keys()), ("have unknown", weights.keys() - wanted.keys())):
        if keys:
            raise ConfigError(f"{file}: not the model of {CONFIG}: the weights {what} {_few(keys)}")
    if unlike := [key for key in wanted if wanted[key].shape != weights[key].shape]:
        raise ConfigError(f"{file}: not the model of {CONFIG}: other shapes of {_few(unlike)}")
    model.load_state_dict(weights)


def _few(keys, limit: int = 3) -> str:
    listed = ", ".join(sorted(keys)[:limit])
    return listed if len(keys) <= limit else f"{listed} and {len(keys) - limit} more"
