"""INT8 through torchao: a tower as a graph that trains as it did, and an image.onnx that says what it says."""

from __future__ import annotations

from copy import deepcopy

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

from kd_accel.models.sparsity import MASK, sparsify
from kd_accel.models.towers import build_open_clip

pytest.importorskip("torchao", reason='needs torchao: pip install "kd-accel[quant-cpu]"')
from kd_accel.int8.torchao import insert, split, write  # noqa: E402

TOWERS = {
    "vit": tiny.arch()["vision_cfg"],
    "resnet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16},
    "timm": {"timm_classifier": "resnet10t", "image_size": 32},  # fresh ones have BatchNorms whose weights are zero
}
PIXELS = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def tower_of(kind: str) -> nn.Module:
    torch.manual_seed(3)
    arch = {"embed_dim": 8, "vision_cfg": TOWERS[kind]}
    return build_open_clip(arch, pretrained=None, preprocess=None, name="student")[0].visual


def small_net() -> nn.Sequential:
    norm = nn.BatchNorm2d(8, eps=0.5, momentum=0.5)
    norm.running_var.copy_(torch.linspace(0.01, 4, 8))
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Flatten(), nn.Dropout(0.5), nn.Linear(8 * 30 * 30, 8))


@pytest.fixture(scope="module")
def quantised():
    """A function: kind -> a tower of it, 2:4 sparse where that is a ResNet of open_clip, quantised."""
    found = {}

    def tower(kind: str) -> nn.Module:
        if kind not in found:
            float_tower = small_net() if kind == "small" else tower_of(kind)
            if kind == "resnet":
                assert sparsify(float_tower)
            found[kind] = insert(float_tower, PIXELS.split(4))
        return deepcopy(found[kind])

    return tower


def cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.cosine_similarity(a, b, dim=-1)


@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_it_is_the_tower_up_to_rounding(quantised, kind):
    """On batches of any size, with the tower's own keys and weights, in its mode."""
    tower, float_tower = quantised(kind), tower_of(kind)
    if kind == "resnet":
        sparsify(float_tower)
    assert tower.training
    weights, held = split(tower.state_dict())
    assert held
    torch.testing.assert_close(weights, float_tower.state_dict(), rtol=0, atol=0)
    for count in (1, 2, 5):
        said, wanted = tower.eval()(PIXELS[:count]), float_tower.eval()(PIXELS[:count])
        assert not torch.equal(said, wanted)
        assert cosines(said, wanted).min() > 0.99


def test_attention_takes_part(quantised):
    """Patches, two matrices of attention, two of the MLP: an activation and a weight each."""
    assert len(quantised("vit").int8) == 2 * 5


@pytest.mark.parametrize("kind", ["vit", "timm"])
def test_it_trains(quantised, kind):
    """All weights move, the loss falls, and zero weights of fresh BatchNorms do no harm."""
    tower, targets = quantised(kind).train(), torch.randn(8, 8)
    before = {name: parameter.detach().clone() for name, parameter in tower.named_parameters()}
    optimizer, losses = torch.optim.AdamW(tower.parameters(), lr=3e-3), []
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.mse_loss(tower(PIXELS), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(parameter.isfinite().all() for parameter in tower.parameters())
    assert not [name for name, parameter in tower.named_parameters() if torch.equal(parameter, before[name])]


def test_ranges_of_activations_stay_and_those_of_weights_follow(quantised):
    """Whatever a rank sees, ranks stay alike."""
    tower = quantised("vit").train()
    before = {key: tensor.clone() for key, tensor in split(tower.state_dict())[1].items() if key.endswith(".scale")}
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.mul_(2)
        tower(100 * PIXELS)
    after = tower.state_dict()
    for key, scale in before.items():
        of_weight = len(scale) > 1
        torch.testing.assert_close(after[key], 2 * scale if of_weight else scale, rtol=1e-6, atol=0)


@torch.no_grad()
def test_a_state_makes_it_again(quantised):
    """In a tower with other weights and ranges; the ranges count."""
    tower, other = quantised("timm").eval(), insert(tower_of("timm").eval(), [torch.zeros(2, 3, 32, 32)])
    said = tower(PIXELS)
    state = tower.state_dict()
    assert not torch.allclose(other(PIXELS), said)
    other.load_state_dict(state)
    assert torch.equal(other(PIXELS), said)
    other.load_state_dict({key: 2 * value if key.endswith(".scale") else value for key, value in state.items()})
    assert not torch.equal(other(PIXELS), said)


@torch.no_grad()
def test_batch_norm_and_dropout_have_their_modes():
    """With the eps and momentum of the module; one that is kept in eval mode stays in it."""
    net = small_net()
    tower = insert(deepcopy(net).eval(), [PIXELS])
    assert cosines(tower(PIXELS), net.eval()(PIXELS)).min() > 0.99
    assert torch.equal(tower(PIXELS), tower(PIXELS))
    torch.testing.assert_close(tower.state_dict()["1.running_mean"], torch.zeros(8), rtol=0, atol=0)
    tower.train(), net.train()
    assert not torch.equal(tower(PIXELS), tower(PIXELS))
    net(PIXELS), net(PIXELS)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(tower.state_dict()[f"1.{name}"], getattr(net[1], name), rtol=0.01, atol=0.01)
    frozen = tower.state_dict()["1.running_mean"].clone()
    tower.get_submodule("1").eval()
    tower(PIXELS)
    assert torch.equal(tower.state_dict()["1.running_mean"], frozen)


def test_bf16_weights_and_autocast_compute_in_fp32(quantised):
    """As DeepSpeed keeps them: parameters in bf16, buffers in fp32; gradients reach the bf16 weights."""
    tower = quantised("timm").eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.copy_(parameter.bfloat16())
        pixels = PIXELS.bfloat16()
        wanted = tower(pixels.float())
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(tower(pixels.float()), wanted)
    for parameter in tower.parameters():
        parameter.data = parameter.data.bfloat16()
    said = tower(pixels)
    assert torch.equal(said, wanted.bfloat16())
    said.float().pow(2).sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in tower.parameters())


def test_gradients_come_back_in_one_order(quantised):
    """Ranks that hand them over in different orders would add up those of different weights."""
    tower = quantised("timm")
    assert list(tower.tensors())[: len(list(tower.parameters()))] == [name for name, _ in tower.named_parameters()]


@pytest.mark.parametrize("kind", ["vit", "resnet", "small"])
@torch.no_grad()
def test_onnx_says_what_the_tower_says(tmp_path, quantised, kind):
    """After BatchNorms have seen data; every product has int8 weights, and 2:4 sparsity is in them."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    tower = quantised(kind).train()
    tower(PIXELS)
    tower.eval()
    write(tower, tmp_path / "image.onnx", PIXELS[:2])
    session = onnxruntime.InferenceSession(tmp_path / "image.onnx")
    for count in (1, 2, 5):
        (said,) = session.run(["image_features"], {"image": PIXELS[:count].numpy()})
        assert cosines(torch.from_numpy(said), tower(PIXELS[:count])).min() > 0.99
    graph = onnx.load(tmp_path / "image.onnx").graph
    assert not [node for node in graph.node if node.op_type == "BatchNormalization"]
    weights = [onnx.numpy_helper.to_array(t) for t in graph.initializer if t.data_type == onnx.TensorProto.INT8]
    products = [weight for weight in weights if weight.ndim > 1]
    assert len(products) == sum(part.scale.numel() > 1 for part in tower.int8.values())
    sparse = [weight for weight in products if (weight == 0).mean() >= 0.5]
    assert len(sparse) == sum(name.endswith(MASK) for name in tower.state_dict())
    for weight in sparse:
        fours = torch.tensor(weight).unflatten(1, (-1, 4)).ne(0).sum(dim=2)
        assert fours.max() <= 2
