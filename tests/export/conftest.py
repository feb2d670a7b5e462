"""Small releases of every kind of student."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import tiny_hf
import torch

from kd_accel.models.hf_text import HFTextTower
from kd_accel.models.release import write_release
from kd_accel.models.towers import build_open_clip

CUSTOM = {
    "embed_dim": 12,
    "quick_gelu": True,
    "custom_text": True,
    "vision_cfg": {"image_size": 36, "patch_size": 12, "width": 24, "layers": 3, "head_width": 6, "mlp_ratio": 2.5},
    "text_cfg": {"context_length": 20, "width": 16, "heads": 4, "layers": 2, "mlp_ratio": 3.0},
}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}


def _arch(kind: str, folder: Path) -> dict:
    arch = tiny.arch()
    match kind:
        case "vit":
            return arch
        case "quick_gelu":
            return arch | {"quick_gelu": True}
        case "resnet":
            return arch | {"vision_cfg": RESNET}
        case "image alone":
            return {"embed_dim": 8, "vision_cfg": arch["vision_cfg"]}
        case "text alone":
            return {"embed_dim": 8, "text_cfg": arch["text_cfg"]}
        case "timm alone":
            return {"embed_dim": 8, "vision_cfg": {"timm_classifier": "resnet10t", "image_size": 64}}
        case "custom":
            return CUSTOM
        case "hf text":
            return arch | {"text_cfg": _hf_text(folder, "mean_pooler")}
        case "hf first token":
            return arch | {"text_cfg": _hf_text(folder, "cls_last_hidden_state_pooler")}
        case "hf alone":
            return {"embed_dim": 8, "text_cfg": _hf_text(folder, "cls_last_hidden_state_pooler")}


def _hf_text(folder: Path, pooler: str) -> dict:
    name = str(tiny_hf.write_text_model(folder / "bert"))
    text = {"hf_model_name": name, "hf_pooler_type": pooler, "hf_proj_type": "linear"}
    return text | {"context_length": 12, "hf_tokenizer_name": name}


def _write(folder: Path, arch: dict) -> Path:
    torch.manual_seed(3)
    model, contract, model_cfg, scale = build_open_clip(arch, pretrained=None, preprocess=None, name="student")
    text = getattr(model, "text", None)
    write_release(
        folder,
        state=model.state_dict(),
        model_cfg=model_cfg,
        contract=contract,
        log_scale=scale.log_scale,
        logit_bias=scale.bias,
        hf_text=text if isinstance(text, HFTextTower) else None,
    )
    return folder


@pytest.fixture(scope="session")
def releases(tmp_path_factory):
    """A function: kind -> its release directory, written once."""
    folder, found = tmp_path_factory.mktemp("releases"), {}

    def release(kind: str) -> Path:
        if kind not in found:
            found[kind] = _write(folder / kind.replace(" ", "_"), _arch(kind, folder))
        return found[kind]

    return release
