"""kd-accel with one timm model more: mobilenetv1_075, whose weights are Google's, converted to safetensors.

    MOBILENET=mobilenet_v1_0.75_224_imagenet.safetensors python tests/benchmarks/mobilenet.py train teacher.yaml

timm has MobileNetV1 of other widths. The file names its tensors conv1, conv_dw_1, conv_pw_1, ..., conv_preds.
"""

from __future__ import annotations

import os

from timm.models import register_model
from timm.models.efficientnet import _gen_mobilenet_v1
from torch import Tensor, nn

from kd_accel import cli

STAGES = (1, 2, 2, 6, 2)  # blocks of each
default_cfgs = {  # where timm's register_model looks
    "mobilenetv1_075": {
        "file": os.environ.get("MOBILENET") or None,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "classifier": "classifier",
    }
}


@register_model
def mobilenetv1_075(pretrained: bool = False, **options) -> nn.Module:
    """MobileNetV1 (arXiv 1704.04861) of three quarters of the width, padded and normalised as in TensorFlow."""
    as_trained = {"pad_type": "same", "bn_eps": 1e-3, "pretrained_filter_fn": renamed}
    return _gen_mobilenet_v1("mobilenetv1_075", 0.75, pretrained=pretrained, **as_trained, **options)


def renamed(state: dict[str, Tensor], _: nn.Module) -> dict[str, Tensor]:
    """The file's tensors under timm's names."""
    names = {"conv1": "conv_stem", "conv1_bn": "bn1", "conv_preds": "classifier"}
    blocks = [f"blocks.{stage}.{i}" for stage, count in enumerate(STAGES) for i in range(count)]
    for number, block in enumerate(blocks, start=1):
        names |= {f"conv_dw_{number}": f"{block}.conv_dw", f"conv_dw_{number}_bn": f"{block}.bn1"}
        names |= {f"conv_pw_{number}": f"{block}.conv_pw", f"conv_pw_{number}_bn": f"{block}.bn2"}
    found = {}
    for key, tensor in state.items():
        layer, _, kind = key.rpartition(".")
        found[f"{names[layer]}.{kind}"] = tensor.flatten(1) if key == "conv_preds.weight" else tensor
    return found


if __name__ == "__main__":
    cli.run()
