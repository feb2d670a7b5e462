"""What is exported: a release as it is, or the image tower of one and the text tower of another as one CLIP."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from open_clip.model import convert_to_custom_text_state_dict
from torch import Tensor

from kd_accel.export_config import ExportConfig
from kd_accel.models.class_head import FILE, ClassHead, read_class_head
from kd_accel.models.hf_text import HFTextTower
from kd_accel.models.int8_state import Int8State, read_int8
from kd_accel.models.release import read_release
from kd_accel.models.release_folder import resolve_release
from kd_accel.models.scale import Scale
from kd_accel.schema import ConfigError
from kd_accel.types import InputContract


@dataclass(frozen=True)
class Exported:
    """All that a release is written from; fp32, on the CPU."""

    sources: tuple[Path, ...]  # the releases that it is made of
    state: dict[str, Tensor]  # open_clip's, without the scale
    model_cfg: dict[str, Any]
    contract: InputContract
    scale: Scale
    hf_text: HFTextTower | None
    int8: Int8State | None  # of the image tower
    class_head: ClassHead | None  # of the image tower


def load_exported(config: ExportConfig) -> Exported:
    """Raises ConfigError for a model that is not to be had, and for towers that do not fit each other."""
    if config.image_from is not None and config.text_from is not None:
        raise ConfigError("image_from, text_from: they leave nothing of model: name one of the two as model")
    found = _read(config.model)
    for tower, source in (("image", config.image_from), ("text", config.text_from)):
        if source is not None:
            found = _joined(found, _read(source), tower, f"{tower}_from={source}")
    scale = found.scale if config.logit_scale is None else Scale(math.log(config.logit_scale), found.scale.bias)
    return replace(found, scale=scale)


def _read(path: str) -> Exported:
    release = resolve_release(path).resolve()
    model, contract, model_cfg, scale = read_release(release)
    text = getattr(model, "text", None)
    hf_text = text if isinstance(text, HFTextTower) else None
    head = release / FILE
    class_head = read_class_head(head, model_cfg["embed_dim"]) if head.is_file() else None
    return Exported((release,), model.state_dict(), model_cfg, contract, scale, hf_text, read_int8(release), class_head)


def _joined(ours: Exported, theirs: Exported, tower: str, given: str) -> Exported:
    """`ours` with its image or text tower replaced by that of `theirs`."""
    if getattr(theirs.contract, tower) is None:
        raise ConfigError(f"{given}: it has no {tower} tower")
    image, text = (theirs, ours) if tower == "image" else (ours, theirs)
    if text.contract.text is None or image.contract.image is None:
        missing = "text" if text.contract.text is None else "image"
        raise ConfigError(
            f"{given}: the model itself has no {missing} tower, so one is still missing: set {missing}_from"
        )
    widths = image.model_cfg["embed_dim"], text.model_cfg["embed_dim"]
    if widths[0] != widths[1]:
        raise ConfigError(f"{given}: its embeddings are not as wide: image {widths[0]}, text {widths[1]}")
    flags = {_quick_gelu(image, "vision_cfg"), _quick_gelu(text, "text_cfg")} - {None}
    if len(flags) > 1:
        raise ConfigError(f"{given}: one tower was trained with QuickGELU and the other with GELU: one CLIP has one")
    model_cfg = {
        **image.model_cfg,
        "vision_cfg": image.model_cfg["vision_cfg"],
        "text_cfg": text.model_cfg["text_cfg"],
        "custom_text": True,
        "quick_gelu": True in flags,
    }
    state = {key: tensor for key, tensor in image.state.items() if key.startswith("visual.")}
    state |= {
        key: tensor for key, tensor in convert_to_custom_text_state_dict(text.state).items() if key.startswith("text.")
    }
    contract = InputContract(image.contract.image, text.contract.text)
    sources = *ours.sources, *theirs.sources
    return Exported(sources, state, model_cfg, contract, text.scale, text.hf_text, image.int8, image.class_head)


def _quick_gelu(exported: Exported, tower: str) -> bool | None:
    """Whether a tower of open_clip's own has QuickGELU; None for others, which the flag does not reach."""
    others = ("hf_model_name", "timm_model_name", "timm_classifier", "torchvision_classifier")
    if any(exported.model_cfg[tower].get(key) for key in others):
        return None
    return exported.model_cfg.get("quick_gelu", False)
