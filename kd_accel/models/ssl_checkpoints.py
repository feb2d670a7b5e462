"""ResNets from other people's checkpoints: MoCo v1 and v2, SimCLR and SwAV as SEED publishes them, and plain files.

    tower, wants = load_ssl("auto", "moco_v2_800ep_pretrain.pth.tar", output="backbone", where="teacher.file")
    features = tower.eval()(pixels)  # [b,3,h,w], normalised as `wants` says -> [b,2048]

| layout | lies under    | prefix                | head                               | left out           |
|--------|---------------|-----------------------|------------------------------------|--------------------|
| moco   | `state_dict`  | `module.encoder_q.`   | `fc` or, in v2, `fc.0 fc.2`        | encoder_k, queue   |
| simclr | `model`       | `module.` three times | `fc.0 fc.1 fc.3`, fc.1 a BatchNorm |                    |
| swav   | the file      | `module.`             | `projection_head.0 .1 .3`, alike   | prototypes         |
| plain  | any of these  | `module.` or none     | `fc`: torchvision's own layout     |                    |

Depth, width and head follow from the names and shapes of the weights. SwAV's wide ResNets widen every layer, unlike
torchvision's wide_resnet50_2; its two paddings of 1 and 2 before the first convolution are torchvision's one of 3.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from kd_accel.schema import ConfigError, one_line
from kd_accel.types import ImageInput

Layout = Literal["moco", "simclr", "swav", "plain"]
IMAGENET = ImageInput((224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear", "shortest")
CONTAINERS = ("state_dict", "model", "model_state_dict")  # keys under which files keep the weights among other things
HEADS = ("fc.", "projection_head.")


def load_ssl(
    kind: Layout | Literal["auto"], file: str | Path, *, output: Literal["backbone", "head"], where: str
) -> tuple[ResNet, ImageInput]:
    """(tower, what it wants to see) of a checkpoint: normalised pixels [b,3,h,w] -> [b, tower.embed_dim], fp32.

    `output`: the pooled features of the backbone, or what the checkpoint's own head makes of them, not normalised.
    Raises ConfigError, which begins with `where`, for a file that is not there or holds more than tensors and plain
    values, for another layout than the `kind` asked for, and for weights that are not those of a whole ResNet.
    """
    state, found = _layout(_read(Path(file), where))
    if kind not in ("auto", found):
        raise ConfigError(f"{where}: {file} has the layout of {found}, not of {kind}: ask for {found}, or for auto")
    body = {key: tensor for key, tensor in state.items() if not key.startswith(HEADS)}
    head = {key.partition(".")[2]: tensor for key, tensor in state.items() if key.startswith(HEADS)}
    if output == "head" and not head:
        raise ConfigError(f"{where}: {file} has no head: take the features of its backbone")
    depths = [_blocks(body, stage) for stage in (1, 2, 3, 4)]
    if "conv1.weight" not in body or 0 in depths:
        raise ConfigError(f"{where}: {file} does not hold a ResNet's weights, but {', '.join(list(body)[:3])}, ...")
    try:
        with torch.device("meta"):  # no weights yet
            tower = _resnet(depths, body)
            if output == "head":
                tower.fc, tower.embed_dim = _head(head)
                body |= {f"fc.{key}": tensor for key, tensor in head.items()}
        tower.load_state_dict(body, strict=True, assign=True)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{where}: {file} does not hold a ResNet of {depths} blocks: {one_line(error)}") from error
    tower.image_size = IMAGENET.size[0]
    return tower, IMAGENET


def _read(file: Path, where: str) -> dict[str, Tensor]:
    """The tensors in `file` by name, fp32 where they are floating point."""
    if not file.is_file():
        raise ConfigError(f"{where}: no such file: {file}")
    try:
        if file.suffix == ".safetensors":
            found = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what a foreign file can raise in two readers has no narrower base
        raise ConfigError(
            f"{where}: {file} does not open as a file of tensors and plain values alone. Files with other objects can"
            " run code and stay closed: where you trust this one, save its state_dict by itself, best as safetensors"
        ) from error
    for key in CONTAINERS:
        found = found[key] if isinstance(found, dict) and isinstance(found.get(key), dict) else found
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ConfigError(f"{where}: {file} holds no state_dict, by itself or under {', '.join(CONTAINERS)}")
    return {key: value.float() if value.is_floating_point() else value for key, value in found.items()}


def _layout(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], Layout]:
    """The weights of the ResNet and of its head, without prefixes, and how they lay."""
    queries = {key.partition("encoder_q.")[2]: tensor for key, tensor in state.items() if "encoder_q." in key}
    if queries:
        return queries, "moco"
    state = {re.sub(r"^(module\.)+", "", key): tensor for key, tensor in state.items()}
    if any(key.startswith(("projection_head.", "prototypes.")) for key in state):
        return {key: tensor for key, tensor in state.items() if not key.startswith("prototypes.")}, "swav"
    return state, "simclr" if "fc.0.weight" in state else "plain"


def _blocks(body: dict[str, Tensor], stage: int) -> int:
    numbers = [int(found[1]) for key in body if (found := re.match(rf"layer{stage}\.(\d+)\.", key))]
    return max(numbers, default=-1) + 1


def _resnet(depths: list[int], body: dict[str, Tensor]) -> ResNet:
    """torchvision's ResNet of that many blocks by stage, each layer as many times wider as the first one is."""
    block = Bottleneck if "layer1.0.conv3.weight" in body else BasicBlock
    width = body["conv1.weight"].shape[0]
    tower = ResNet(block, depths)
    tower.inplanes = width
    tower.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
    tower.bn1 = nn.BatchNorm2d(width)
    for stage, depth in enumerate(depths):
        layer = tower._make_layer(block, width * 2**stage, depth, stride=1 if stage == 0 else 2)
        setattr(tower, f"layer{stage + 1}", layer)
    tower.fc = nn.Identity()
    tower.embed_dim = tower.inplanes
    return tower


def _head(state: dict[str, Tensor]) -> tuple[nn.Module, int]:
    """A linear layer, or a row of layers by number, where those without weights are ReLUs; the width of its output."""
    if "weight" in state:
        head = _layer(state)
        return head, head.out_features
    layers: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in state.items():
        number, _, name = key.partition(".")
        layers[int(number)][name] = tensor
    row = [_layer(layers[i]) if i in layers else nn.ReLU() for i in range(max(layers) + 1)]
    return nn.Sequential(*row), [layer for layer in row if isinstance(layer, nn.Linear)][-1].out_features


def _layer(state: dict[str, Tensor]) -> nn.Module:
    if "running_mean" in state:
        return nn.BatchNorm1d(len(state["running_mean"]))
    outputs, inputs = state["weight"].shape
    return nn.Linear(inputs, outputs, bias="bias" in state)
