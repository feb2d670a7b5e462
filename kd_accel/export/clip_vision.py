"""A ViT of open_clip as transformers' CLIPVisionModel under a projection: the image side of what we write for it.

CLIPVisionModel is OpenAI's: a class token is read, after a layer norm. What open_clip offers beyond that has no place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from open_clip.model import CLIPVisionCfg
from torch import Tensor
from transformers import CLIPImageProcessor

from kd_accel.types import ImageInput

# Keys that CLIPVisionModel has too, or that only matter in training; others must be as open_clip has them
KEYS = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout"}
BLOCK = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
BLOCK |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}


def beyond_vision(model_cfg: dict[str, Any], image: ImageInput) -> str | None:
    """What CLIPVisionModel and its image processor have no place for, in words; None: nothing."""
    odd = odd_key(model_cfg, "vision_cfg", KEYS, CLIPVisionCfg)
    if odd is not None:
        return odd
    if not isinstance(model_cfg["vision_cfg"].get("layers", 12), int):
        return "a ResNet"
    if image.size[0] != image.size[1]:
        return f"images of {image.size}"
    if image.resize_mode == "longest":
        return "resize_mode=longest"
    return None


def odd_key(model_cfg: dict[str, Any], tower: str, known: set[str], plain: type) -> str | None:
    """The first key of a tower that is not `known` and not as the dataclass `plain` has it."""
    usual = {field.name: field.default for field in fields(plain)}
    odd = [key for key, value in model_cfg[tower].items() if key not in known and value != usual.get(key)]
    return f"{tower}.{odd[0]}={model_cfg[tower][odd[0]]}" if odd else None


def vision_config(model_cfg: dict[str, Any]) -> dict[str, Any]:
    """Keys of a CLIPVisionConfig."""
    known = {field.name for field in fields(CLIPVisionCfg)}
    vision = CLIPVisionCfg(**{key: value for key, value in model_cfg["vision_cfg"].items() if key in known})
    size = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    return {
        "hidden_size": vision.width,
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.width // vision.head_width,
        "intermediate_size": int(vision.width * vision.mlp_ratio),
        "image_size": size,
        "patch_size": vision.patch_size,
        **shared_config(model_cfg),
    }


def shared_config(model_cfg: dict[str, Any]) -> dict[str, Any]:
    """Keys that both towers of a CLIPModel have."""
    return {
        "projection_dim": model_cfg["embed_dim"],
        "hidden_act": "quick_gelu" if model_cfg.get("quick_gelu") else "gelu",
    }


def renamed_vision(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """open_clip's tensors of the image tower by their names in transformers."""
    yield "visual_projection.weight", state["visual.proj"].T
    vision = "vision_model.embeddings"
    yield f"{vision}.class_embedding", state["visual.class_embedding"]
    yield f"{vision}.patch_embedding.weight", state["visual.conv1.weight"]
    yield f"{vision}.position_embedding.weight", state["visual.positional_embedding"]
    for part in ("weight", "bias"):
        yield f"vision_model.pre_layrnorm.{part}", state[f"visual.ln_pre.{part}"]
        yield f"vision_model.post_layernorm.{part}", state[f"visual.ln_post.{part}"]
    yield from renamed_blocks(state, "visual.transformer.resblocks.", "vision_model.encoder.layers.")


def renamed_blocks(state: dict[str, Tensor], ours: str, theirs: str) -> Iterator[tuple[str, Tensor]]:
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


def image_processor(image: ImageInput) -> CLIPImageProcessor:
    """Resizes, crops and normalises as `image` says; `beyond_vision` says which it can."""
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
