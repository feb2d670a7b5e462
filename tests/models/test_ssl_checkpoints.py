"""Self-supervised checkpoints: files of each layout, made here by hand, give the features of the model behind them."""

from __future__ import annotations

import argparse

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from kd_accel.models.ssl_checkpoints import load_ssl
from kd_accel.schema import ConfigError

WIDTH = 2048  # of the features of a ResNet-50


class Swav(nn.Module):
    """SwAV's ResNet: padding apart from the first convolution, every layer `widen` times as wide; few blocks."""

    def __init__(self, widen: int):
        super().__init__()
        self.padding = nn.ConstantPad2d(1, 0.0)
        self.conv1 = nn.Conv2d(3, 64 * widen, 7, stride=2, padding=2, bias=False)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.relu, self.maxpool = nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)
        inputs = 64 * widen
        for stage, blocks in enumerate([1, 2, 1, 1]):
            planes, layers = 64 * widen * 2**stage, []
            for block in range(blocks):
                stride = 2 if stage and block == 0 else 1
                shortcut = nn.Sequential(
                    nn.Conv2d(inputs, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes)
                )
                layers.append(Bottleneck(inputs, planes, stride, shortcut if block == 0 else None))
                inputs = 4 * planes
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.projection_head = nn.Sequential(nn.Linear(inputs, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 16))
        self.prototypes = nn.Linear(16, 30, bias=False)

    def forward(self, pixels):
        """(features of the backbone, of the head)"""
        rows = self.maxpool(self.relu(self.bn1(self.conv1(self.padding(pixels)))))
        rows = self.layer4(self.layer3(self.layer2(self.layer1(rows)))).mean((2, 3))
        return rows, self.projection_head(rows)


def resnet(head: nn.Module) -> ResNet:
    model = ResNet(Bottleneck, [1, 2, 1, 1])
    model.fc = head
    return model


def lively(model: nn.Module) -> nn.Module:
    """Running statistics that are not those of a fresh model, in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def under(prefix: str, model: nn.Module) -> dict:
    return {prefix + key: tensor for key, tensor in model.state_dict().items()}


def moco(head: nn.Module):
    model = lively(resnet(head))
    keys = under("module.encoder_k.", resnet(nn.Linear(WIDTH, 16)))
    queue = {"module.queue": torch.randn(16, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9).state_dict()
    state = under("module.encoder_q.", model) | keys | queue
    return model, {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": optimizer}


def simclr():
    model = lively(resnet(nn.Sequential(nn.Linear(WIDTH, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 16))))
    return model, {"model": under("module.module.module.", model), "epoch": 200}


def swav(widen: int):
    model = lively(Swav(widen))
    return model, under("module.", model)


def plain():
    model = lively(resnet(nn.Linear(WIDTH, 1000)))
    return model, dict(model.state_dict())


LAYOUTS = {
    "moco_v1": lambda: moco(nn.Linear(WIDTH, 16)),
    "moco_v2": lambda: moco(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 16))),
    "simclr": simclr,
    "swav": lambda: swav(1),
    "swav_w2": lambda: swav(2),
    "plain": plain,
}


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of a layout: (the model behind it, its file)."""

    def save(layout: str):
        model, content = LAYOUTS[layout]()
        torch.save(content, tmp_path / "checkpoint.pth.tar")
        return model, tmp_path / "checkpoint.pth.tar"

    return save


def load(file, kind="auto", output="backbone"):
    return load_ssl(kind, file, output=output, where="teacher.file")


def expected(model: nn.Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    if isinstance(model, Swav):
        return dict(zip(("backbone", "head"), model(pixels), strict=True))
    head, model.fc = model.fc, nn.Identity()
    return {"backbone": model(pixels), "head": head(model(pixels))}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_are_those_of_the_model_behind_the_file(layout, saved):
    """Of backbone and head, in eval mode, exactly; the tower says how wide they are and what it wants to see."""
    model, file = saved(layout)
    pixels = torch.randn(2, 3, 64, 64)
    for output, rows in expected(model, pixels).items():
        tower, wants = load(file, output=output)
        torch.testing.assert_close(tower.eval()(pixels), rows)
        assert tower.embed_dim == rows.shape[1]
        assert wants.size == (224, 224) == (tower.image_size, tower.image_size)


def test_swav_widens_every_layer(saved):
    """RN50w2's features are 4096 wide, as SwAV's paper has it; torchvision's wide_resnet50_2 has 2048."""
    assert load(saved("swav_w2")[1])[0].embed_dim == 4096


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet101", "resnet152"])
def test_depth_follows_from_the_weights(name, tmp_path):
    """A safetensors file in half precision of torchvision's own; the tower is fp32."""
    model = lively(models.get_model(name, weights=None).half().float())
    save_file(model.half().state_dict(), tmp_path / "weights.safetensors")
    tower, _ = load(tmp_path / "weights.safetensors", output="head")
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.float32}
    pixels = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(tower.eval()(pixels), model.float()(pixels))


def test_batch_counts_may_be_missing(tmp_path):
    """Files of torch 0.4 have none."""
    model = lively(ResNet(BasicBlock, [1, 1, 1, 1]))
    state = {key: tensor for key, tensor in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    tower, _ = load(tmp_path / "old.pth", output="head")
    pixels = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(tower.eval()(pixels), model(pixels))
    assert not [name for name, buffer in tower.named_buffers() if buffer.is_meta]


def test_the_tower_trains(saved):
    """Its weights are leaves with gradients, as those of any other tower."""
    tower, _ = load(saved("moco_v1")[1])
    tower(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in tower.parameters())


def test_the_kind_is_checked(saved):
    _, file = saved("moco_v2")
    assert load(file, kind="moco")[0].embed_dim == WIDTH
    with pytest.raises(ConfigError, match=r"^teacher\.file: .* has the layout of moco, not of swav"):
        load(file, kind="swav")


def test_files_that_can_run_code_stay_closed(tmp_path):
    """One line, and the object in the file is never made."""
    file = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": {}, "opt": argparse.Namespace(lr=1)}, file)
    with pytest.raises(ConfigError, match=r"^teacher\.file: .* does not open as a file of tensors") as error:
        load(file)
    assert "\n" not in str(error.value)


def test_weights_that_do_not_fit(saved, tmp_path):
    """A missing one, one too many, and those of another kind of model."""
    _, content = LAYOUTS["plain"]()
    broken = {
        "missing": {key: tensor for key, tensor in content.items() if key != "layer2.1.conv2.weight"},
        "unexpected": content | {"layer2.1.conv4.weight": torch.zeros(1)},
    }
    for said, state in broken.items():
        torch.save(state, tmp_path / "weights.pth")
        with pytest.raises(ConfigError, match=rf"does not hold a ResNet of \[1, 2, 1, 1\] blocks: .*(?i:{said})") as e:
            load(tmp_path / "weights.pth")
        assert "\n" not in str(e.value)
    torch.save({"blocks.0.attn.qkv.weight": torch.zeros(2)}, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match="does not hold a ResNet's weights, but blocks.0.attn"):
        load(tmp_path / "weights.pth")
    torch.save([1, 2], tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match="holds no state_dict, by itself or under state_dict, model"):
        load(tmp_path / "weights.pth")


def test_a_head_that_is_not_there(tmp_path):
    state = {key: tensor for key, tensor in LAYOUTS["plain"]()[1].items() if not key.startswith("fc.")}
    torch.save(state, tmp_path / "weights.pth")
    assert load(tmp_path / "weights.pth")[0].embed_dim == WIDTH
    with pytest.raises(ConfigError, match=r"weights\.pth has no head: take the features of its backbone"):
        load(tmp_path / "weights.pth", output="head")


def test_no_such_file(tmp_path):
    with pytest.raises(ConfigError, match=r"^teacher\.file: no such file: .*nowhere\.pth$"):
        load(tmp_path / "nowhere.pth")
