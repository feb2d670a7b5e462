"""CLIP and SigLIP checkpoints in transformers' format, as teachers.

    model, contract, embed_dim, scale = build_hf_clip("openai/clip-vit-base-patch32", where="teacher.hf")
    image_features = model.encode_image(pixels)   # [b, d], CLIPModel.get_image_features(pixels)
    text_features = model.encode_text(tokens)     # [b, d]

SigLIP 2 is here where its images have one size, which transformers calls "siglip" as well. Its other form (NaFlex,
"siglip2") takes a list of patches of its own and is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig

from kd_accel.models.hub import NOT_TO_BE_HAD, unavailable
from kd_accel.models.scale import Scale, take_scale
from kd_accel.models.two_towers import TwoTowers
from kd_accel.schema import ConfigError
from kd_accel.types import ImageInput, InputContract, TextInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # takes half a second to import

INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, which processors keep


class PooledTower(nn.Module):
    """One encoder with its projection: pixels `[b,3,h,w]` or tokens `[b,T]` -> `[b,d]`."""

    def __init__(self, encoder: nn.Module, projection: nn.Module):
        super().__init__()
        self.encoder, self.projection = encoder, projection

    def forward(self, given: Tensor) -> Tensor:
        return self.projection(self.encoder(given).pooler_output)


@dataclass(frozen=True)
class ClipTokenizer:
    """Captions -> `[b,T]`; what stands behind a caption's end is `pad`, or the tokenizer's own padding if that is None.

    CLIP's tokenizers pad with the end-of-text token, of which the first counts: that one must stay when padding is cut.
    """

    tokenizer: Any  # of transformers
    context_length: int
    pad: int | None

    def __call__(self, captions: list[str]) -> Tensor:
        encoded = self.tokenizer(
            captions,
            padding="max_length",
            truncation=True,
            max_length=self.context_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        if self.pad is None:
            return encoded.input_ids
        return encoded.input_ids.masked_fill(encoded.attention_mask == 0, self.pad)


def build_hf_clip(name: str, *, where: str, weights: bool = True) -> tuple[TwoTowers, InputContract, int, Scale]:
    """(model in eval mode and fp32, what it wants as input, d, its scale). `name`: on the Hub, or a folder.

    The input contract is that of the checkpoint's own processor and tokenizer files. No code from the Hub is run.
    `weights`: false leaves fresh ones in.
    Raises ConfigError, which begins with `where`, for what is not to be had, is of another kind, or resizes its images
    in a way that no ImageInput can say.
    """
    from transformers import AutoImageProcessor  # takes a second to import: only for those who have such a model

    config = _load(AutoConfig, "model", name, where)
    if config.model_type not in ("clip", "siglip"):
        raise ConfigError(f"{where}: {name} is a {config.model_type} model; clip and siglip are supported")
    image = _image_input(_load(AutoImageProcessor, "image processor", name, where), config, name, where)
    text = _text_input(_load(AutoTokenizer, "tokenizer", name, where), config, name, where)
    model = _with_weights(name, where) if weights else AutoModel.from_config(config, dtype=torch.float32)
    towers, embed_dim = _towers(model)
    bias = model.logit_bias.item() if config.model_type == "siglip" else None
    return towers.eval(), InputContract(image, text), embed_dim, Scale(model.logit_scale.item(), bias)


def _with_weights(name: str, where: str) -> PreTrainedModel:
    model, loaded = _load(AutoModel, "model", name, where, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(loaded["missing_keys"]):
        raise ConfigError(f"{where}: the weights of {name} lack {missing[0]} ({len(missing)} tensors in all)")
    return model


def is_hf_clip(name: str, *, where: str) -> bool:
    """Whether `name` has two towers, and is not a text encoder; raises ConfigError, which begins with `where`."""
    return _load(AutoConfig, "model", name, where).model_type in ("clip", "siglip", "siglip2")


def _towers(model: PreTrainedModel) -> tuple[TwoTowers, int]:
    """SigLIP's towers end in the shared space; CLIP has a projection behind each."""
    if model.config.model_type == "clip":
        embed_dim, projections = model.config.projection_dim, (model.visual_projection, model.text_projection)
    else:
        embed_dim, projections = model.config.vision_config.hidden_size, (nn.Identity(), nn.Identity())
    image, text = PooledTower(model.vision_model, projections[0]), PooledTower(model.text_model, projections[1])
    towers = TwoTowers(image, text)
    take_scale(towers)
    return towers, embed_dim


def _image_input(processor: Any, config: PreTrainedConfig, name: str, where: str) -> ImageInput:
    """A crop in the middle is what is left of the shorter side at the image's size; no crop means squashed sides."""
    wanted, size = dict(processor.size), (config.vision_config.image_size,) * 2
    crop = dict(processor.crop_size) if getattr(processor, "do_center_crop", False) else None
    square = dict(zip(("height", "width"), size, strict=True))
    if crop == square and wanted == {"shortest_edge": size[0]}:
        mode = "shortest"
    elif crop is None and wanted == square:
        mode = "squash"
    else:
        raise ConfigError(
            f"{where}: {name} sees {size[0]} pixels, but its processor resizes to {wanted} and crops to {crop}: let"
            f" preprocessor_config.json resize to {size[0]}, and crop to that or not at all"
        )
    interpolation = INTERPOLATIONS.get(int(processor.resample))
    if interpolation is None:
        raise ConfigError(
            f"{where}: {name} resizes with PIL's filter {processor.resample}; bicubic or bilinear is needed"
        )
    return ImageInput(size, tuple(processor.image_mean), tuple(processor.image_std), interpolation, mode)


def _text_input(tokenizer: Any, config: PreTrainedConfig, name: str, where: str) -> TextInput:
    """CLIP reads the end-of-text token and nothing behind it; SigLIP reads its padding."""
    known, vocab_size = len(tokenizer), config.text_config.vocab_size
    if known > vocab_size:
        raise ConfigError(f"{where}: {name}: the tokenizer knows {known} tokens, the model {vocab_size}")
    length = config.text_config.max_position_embeddings
    pad = 0 if config.model_type == "clip" else None
    return TextInput(length, f"transformers {name}", ClipTokenizer(tokenizer, length, pad), pad)


def _load(auto: Any, what: str, name: str, where: str, **options: Any) -> Any:
    try:
        return auto.from_pretrained(name, trust_remote_code=False, **options)
    except NOT_TO_BE_HAD as error:
        raise unavailable(f"the {what} of '{name}'", where, error) from error
