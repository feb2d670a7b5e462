"""A CLIP with a text tower of HuggingFace as transformers' VisionTextDualEncoderModel, with processor and tokenizer.

    config.json  model.safetensors  processor_config.json  tokenizer files
    text/config.json   of the text tower alone, which open_clip wants to find in a folder

    model = AutoModel.from_pretrained(DIRECTORY); processor = AutoProcessor.from_pretrained(DIRECTORY)

The image tower is CLIPVisionModel's (clip_vision.py). Of the text model the class reads `pooler_output`, and projects
it without a bias. With BERT and its kin that is tanh(dense(first token)), as in towers with hf_pooler_type=cls_pooler.
The first token itself (cls_last_hidden_state_pooler) comes through a dense layer that makes it so small that
tanh x = x, and a projection that is as much larger. Means and maxima over tokens have no place.

The config.json of the text tower moves into that of both, as text_config, where kd_accel finds it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)

from kd_accel.export.clip_vision import beyond_vision, image_processor, renamed_vision, vision_config
from kd_accel.models.hf_text import POOLERS, HFTextTower
from kd_accel.schema import ConfigError
from kd_accel.types import InputContract

# x -> tanh(x * SMALL) / SMALL is off by (x * SMALL)^2 / 3 of x: 3e-7 at x = 16. The smallest normal number of fp16.
SMALL = 2.0**-14


def check_dual_encoder(model_cfg: dict[str, Any], contract: InputContract, text: HFTextTower) -> None:
    """Raises ConfigError that names what VisionTextDualEncoderModel has no place for."""
    reason = _beyond(model_cfg, contract, text)
    if reason is not None:
        raise ConfigError(
            "format=transformers: VisionTextDualEncoderModel is a plain ViT beside the linearly projected first token"
            f" of a BERT-like text model, and this model has {reason}: leave this format out; open_clip's and onnx hold"
            " every student"
        )


def write_dual_encoder(
    directory: Path,
    *,
    state: dict[str, Tensor],
    text: HFTextTower,
    model_cfg: dict[str, Any],
    contract: InputContract,
    log_scale: float,
) -> None:
    """Add the files to `directory`, where those of a release lie already.

    `state` is open_clip's, fp32. Raises ConfigError as `check_dual_encoder`.
    """
    check_dual_encoder(model_cfg, contract, text)
    config = VisionTextDualEncoderConfig(
        projection_dim=model_cfg["embed_dim"],
        vision_config={"model_type": "clip_vision_model", **vision_config(model_cfg)},
        text_config=text.config.to_dict(),
    )
    renamed = dict(renamed_vision(state)) | _renamed_text(state, text) | {"logit_scale": torch.tensor(log_scale)}
    model = VisionTextDualEncoderModel(config)
    model.load_state_dict({key: tensor.clone().contiguous() for key, tensor in renamed.items()})
    length, images = contract.text.context_length, image_processor(contract.image)
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="right", model_max_length=length)
    text.config.save_pretrained(directory / "text")
    model.save_pretrained(directory)
    VisionTextDualEncoderProcessor(images, tokenizer).save_pretrained(directory)


def _beyond(model_cfg: dict[str, Any], contract: InputContract, text: HFTextTower) -> str | None:
    if contract.image is None:
        return "one tower alone (image_from and text_from add the other)"
    if (beyond := beyond_vision(model_cfg, contract.image)) is not None:
        return beyond
    if isinstance(text.proj, nn.Sequential):
        return "text_cfg.hf_proj_type=mlp"
    if text.pooling not in ("pooler", "cls"):
        return f"text_cfg.hf_pooler_type={POOLERS[text.pooling]}"
    if text.pooling == "cls" and not _has_tanh_pooler(text.config):
        return f"a {text.config.model_type} text model, which makes no pooler_output as BERT does"
    return None


def _has_tanh_pooler(config: PreTrainedConfig) -> bool:
    """Whether the encoder, as transformers builds it, ends in tanh(dense(first token))."""
    with torch.device("meta"):
        pooler = getattr(AutoModel.from_config(config), "pooler", None)
    return isinstance(getattr(pooler, "dense", None), nn.Linear) and isinstance(pooler.activation, nn.Tanh)


def _renamed_text(state: dict[str, Tensor], text: HFTextTower) -> dict[str, Tensor]:
    """Our tensors of the text tower by their names in VisionTextDualEncoderModel, with a pooler where it has none."""
    encoder = {f"text_model.{key}": state[f"text.transformer.{key}"] for key in text.transformer.state_dict()}
    identity = torch.eye(text.config.hidden_size)
    projection = identity if isinstance(text.proj, nn.Identity) else state["text.proj.weight"]
    if text.pooling == "cls":
        encoder |= {"text_model.pooler.dense.weight": SMALL * identity}
        encoder |= {"text_model.pooler.dense.bias": torch.zeros(len(identity))}
        projection = projection / SMALL
    return encoder | {"text_projection.weight": projection}
