"""A CLIP of open_clip as transformers' CLIPModel, with the processor and the tokenizer that go with it.

    config.json  model.safetensors  processor_config.json  tokenizer.json  tokenizer_config.json  ...

    model = CLIPModel.from_pretrained(DIRECTORY); processor = CLIPProcessor.from_pretrained(DIRECTORY)

CLIPModel is OpenAI's: a plain ViT (clip_vision.py) and a causal text transformer that is read at its end. What
open_clip offers beyond that has no place in it, and is refused. Features agree up to rounding; the processor's
resampling differs from open_clip's in the last bits of a pixel.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIPTextCfg
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizerFast

from kd_accel.export.clip_vision import (
    beyond_vision,
    image_processor,
    odd_key,
    renamed_blocks,
    renamed_vision,
    shared_config,
    vision_config,
)
from kd_accel.models.input_contract import CLIP_BPE
from kd_accel.schema import ConfigError
from kd_accel.types import InputContract

# Keys that CLIPModel has too; others must be as open_clip has them
TEXT_KEYS = {"layers", "width", "heads", "mlp_ratio", "context_length", "vocab_size", "hf_tokenizer_name"}
END_OF_TEXT = 49407  # of CLIP's vocabulary; padding too, as in transformers' files of CLIP


def check_plain_clip(model_cfg: dict[str, Any], contract: InputContract) -> None:
    """Raises ConfigError that names what CLIPModel has no place for."""
    reason = _beyond(model_cfg, contract)
    if reason is not None:
        raise ConfigError(
            f"format=transformers: CLIPModel is a plain ViT with a plain text transformer, and this model has {reason}:"
            " leave this format out; open_clip's and onnx hold every student"
        )


def write_transformers_clip(
    directory: Path,
    *,
    state: dict[str, Tensor],
    model_cfg: dict[str, Any],
    contract: InputContract,
    log_scale: float,
) -> None:
    """Add the files to `directory`; `state` is open_clip's, fp32. Raises ConfigError as `check_plain_clip`."""
    check_plain_clip(model_cfg, contract)
    model = CLIPModel(_config(model_cfg))
    renamed = dict(_renamed(state, model_cfg)) | {"logit_scale": torch.tensor(log_scale)}
    model.load_state_dict({key: tensor.clone().contiguous() for key, tensor in renamed.items()})
    model.save_pretrained(directory)
    tokenizer = CLIPTokenizerFast.from_pretrained(directory, pad_token="<|endoftext|>")
    CLIPProcessor(image_processor=image_processor(contract.image), tokenizer=tokenizer).save_pretrained(directory)


def _beyond(model_cfg: dict[str, Any], contract: InputContract) -> str | None:
    if contract.image is None or contract.text is None:
        return "one tower alone (image_from and text_from add the other)"
    beyond = beyond_vision(model_cfg, contract.image) or odd_key(model_cfg, "text_cfg", TEXT_KEYS, CLIPTextCfg)
    if beyond is None and contract.text.tokenizer != CLIP_BPE:
        return f"the tokenizer {contract.text.tokenizer}"
    return beyond


def _config(model_cfg: dict[str, Any]) -> CLIPConfig:
    text = CLIPTextCfg(**model_cfg["text_cfg"])
    return CLIPConfig(
        projection_dim=model_cfg["embed_dim"],
        vision_config=vision_config(model_cfg),
        text_config={
            "hidden_size": text.width,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "intermediate_size": int(text.width * text.mlp_ratio),
            "max_position_embeddings": text.context_length,
            "vocab_size": text.vocab_size,
            "bos_token_id": END_OF_TEXT - 1,
            "eos_token_id": END_OF_TEXT,
            "pad_token_id": END_OF_TEXT,
            **shared_config(model_cfg),
        },
    )


def _renamed(state: dict[str, Tensor], model_cfg: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """open_clip's tensors by the names of CLIPModel."""
    yield from renamed_vision(state)
    text = "text." if model_cfg.get("custom_text") else ""
    yield "text_projection.weight", state[f"{text}text_projection"].T
    yield "text_model.embeddings.token_embedding.weight", state[f"{text}token_embedding.weight"]
    yield "text_model.embeddings.position_embedding.weight", state[f"{text}positional_embedding"]
    for part in ("weight", "bias"):
        yield f"text_model.final_layer_norm.{part}", state[f"{text}ln_final.{part}"]
    yield from renamed_blocks(state, f"{text}transformer.resblocks.", "text_model.encoder.layers.")
