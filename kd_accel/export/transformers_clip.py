"""A CLIP of open_clip as transformers' CLIPModel, with the processor and the tokenizer that go with it.

    config.json  model.safetensors  preprocessor_config.json  tokenizer.json  tokenizer_config.json  ...

    model = CLIPModel.from_pretrained(DIRECTORY); processor = CLIPProcessor.from_pretrained(DIRECTORY)

CLIPModel is OpenAI's: a ViT with a class token and a causal text transformer that is read at its end. What open_clip
offers beyond that has no place in it, and is refused. Features agree up to rounding; the processor's resampling differs
from open_clip's in the last bits of a pixel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

from kd_accel.models.towers import CLIP_BPE
from kd_accel.schema import ConfigError
from kd_accel.types import ImageInput, InputContract

# Keys of a tower that CLIPModel has too, or that only matter in training; others must be as open_clip has them
VISION_KEYS = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout"}
TEXT_KEYS = {"layers", "width", "heads", "mlp_ratio", "context_length", "vocab_size", "hf_tokenizer_name"}
BLOCK = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
BLOCK |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
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
    CLIPProcessor(image_processor=_image_processor(contract.image), tokenizer=tokenizer).save_pretrained(directory)


def _beyond(model_cfg: dict[str, Any], contract: InputContract) -> str | None:
    if contract.image is None or contract.text is None:
        return "one tower alone"
    for tower, known, plain in (("vision_cfg", VISION_KEYS, CLIPVisionCfg), ("text_cfg", TEXT_KEYS, CLIPTextCfg)):
        usual = {field.name: field.default for field in fields(plain)}
        odd = [key for key, value in model_cfg[tower].items() if key not in known and value != usual.get(key)]
        if odd:
            return f"{tower}.{odd[0]}={model_cfg[tower][odd[0]]}"
    if not isinstance(model_cfg["vision_cfg"].get("layers", 12), int):
        return "a ResNet"
    if contract.text.tokenizer != CLIP_BPE:
        return f"the tokenizer {contract.text.tokenizer}"
    if contract.image.size[0] != contract.image.size[1]:
        return f"images of {contract.image.size}"
    if contract.image.resize_mode == "longest":
        return "resize_mode=longest"
    return None


def _config(model_cfg: dict[str, Any]) -> CLIPConfig:
    known = {field.name for field in fields(CLIPVisionCfg)}
    vision = CLIPVisionCfg(**{key: value for key, value in model_cfg["vision_cfg"].items() if key in known})
    text = CLIPTextCfg(**model_cfg["text_cfg"])
    shared = {
        "projection_dim": model_cfg["embed_dim"],
        "hidden_act": "quick_gelu" if model_cfg.get("quick_gelu") else "gelu",
    }
    size = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    return CLIPConfig(
        projection_dim=model_cfg["embed_dim"],
        vision_config={
            "hidden_size": vision.width,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.width // vision.head_width,
            "intermediate_size": int(vision.width * vision.mlp_ratio),
            "image_size": size,
            "patch_size": vision.patch_size,
            **shared,
        },
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
            **shared,
        },
    )


def _renamed(state: dict[str, Tensor], model_cfg: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """open_clip's tensors by the names of CLIPModel."""
    text = "text." if model_cfg.get("custom_text") else ""
    yield "visual_projection.weight", state["visual.proj"].T
    yield "text_projection.weight", state[f"{text}text_projection"].T
    vision = "vision_model.embeddings"
    yield f"{vision}.class_embedding", state["visual.class_embedding"]
    yield f"{vision}.patch_embedding.weight", state["visual.conv1.weight"]
    yield f"{vision}.position_embedding.weight", state["visual.positional_embedding"]
    yield "text_model.embeddings.token_embedding.weight", state[f"{text}token_embedding.weight"]
    yield "text_model.embeddings.position_embedding.weight", state[f"{text}positional_embedding"]
    for part in ("weight", "bias"):
        yield f"vision_model.pre_layrnorm.{part}", state[f"visual.ln_pre.{part}"]
        yield f"vision_model.post_layernorm.{part}", state[f"visual.ln_post.{part}"]
        yield f"text_model.final_layer_norm.{part}", state[f"{text}ln_final.{part}"]
    yield from _blocks(state, "visual.transformer.resblocks.", "vision_model.encoder.layers.")
    yield from _blocks(state, f"{text}transformer.resblocks.", "text_model.encoder.layers.")


def _blocks(state: dict[str, Tensor], ours: str, theirs: str) -> Iterator[tuple[str, Tensor]]:
    """Of every transformer block; open_clip has queries, keys and values in one matrix."""
    for key, tensor in state.items():
        if not key.startswith(ours):
            continue
        number, _, name = key.removeprefix(ours).partition(".")
        if name.startswith("attn.in_proj_"):
            part = name.removeprefix("attn.in_proj_")
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                yield f"{theirs}{number}.self_attn.{letter}_proj.{part}", third
        else:
            place, _, part = name.rpartition(".")
            yield f"{theirs}{number}.{BLOCK[place]}.{part}", tensor


def _image_processor(image: ImageInput) -> CLIPImageProcessor:
    height, width = image.size
    squash = image.resize_mode == "squash"
    return CLIPImageProcessor(
        size={"height": height, "width": width} if squash else {"shortest_edge": height},
        do_center_crop=not squash,
        crop_size={"height": height, "width": width},
        resample={"bicubic": 3, "bilinear": 2}[image.interpolation],
        image_mean=list(image.mean),
        image_std=list(image.std),
    )
