"""modelopt's fake quantisers in an image tower: where they are, that 2:4 sparsity outlives them, what image.onnx is."""

from __future__ import annotations

import pytest

pytest.importorskip("modelopt", reason='the extra "quant" is not installed')
pytest.importorskip("onnxruntime", reason='the extra "export" is not installed')

import modelopt.torch.sparsity as mts
import numpy as np
import onnx
import onnxruntime
import tiny
import torch
from onnx import numpy_helper
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from kd_accel.int8 import modelopt
from kd_accel.models.sparsity import sparsify, without_masks
from kd_accel.models.towers import build_open_clip

RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16}
LAYERS = {  # those that are called as layers: open_clip's attention reads the matrices inside it by itself
    "vit": ["conv1", "transformer.resblocks.0.mlp.c_fc", "transformer.resblocks.0.mlp.c_proj"],
    "resnet": [f"conv{i}" for i in (1, 2, 3)]
    + [f"layer{i}.0.{layer}" for i in (1, 2, 3, 4) for layer in ("conv1", "conv2", "conv3", "downsample.0")],
    "timm": ["conv1", "fc"]
    + [f"layer{i}.0.{layer}" for i in (1, 2, 3, 4) for layer in ("conv1", "conv2", "downsample.0")],
}
EVERY = pytest.mark.parametrize("kind", LAYERS)
PIXELS = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(4))


def tower(kind: str) -> nn.Module:
    """One with weights as training leaves them: normalisation has seen pictures, and no branch is switched off."""
    torch.manual_seed(1)
    if kind == "timm":
        made = ResNet(BasicBlock, (1, 1, 1, 1), 8, channels=(16, 16, 32, 32), zero_init_last=False)
    else:
        vision = RESNET if kind == "resnet" else tiny.arch(32)["vision_cfg"]
        made = build_open_clip(
            tiny.arch(32) | {"vision_cfg": vision}, pretrained=None, preprocess=None, name="student"
        )[0].visual
    for name, parameter in made.named_parameters():
        if kind == "resnet" and name.endswith("bn3.weight"):
            nn.init.ones_(parameter)
    made.train()
    for _ in range(20):
        made(PIXELS)
    return made


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        (model.train()(PIXELS) - 1).square().mean().backward()
        optimizer.step()


def quantised_layers(model: nn.Module) -> list[str]:
    parts = [(n, part.weight_quantizer) for n, part in model.named_modules() if hasattr(part, "weight_quantizer")]
    return [name for name, quantiser in parts if quantiser.is_enabled]


@torch.no_grad()
def largest_inputs(model: nn.Module, layers: list[str]) -> dict[str, torch.Tensor]:
    """By layer the largest number that it sees of PIXELS, in eval mode."""
    seen, parts = {}, dict(model.named_modules())

    def look(name, inputs):
        seen[name] = inputs[0].abs().max()

    hooks = [parts[n].register_forward_pre_hook(lambda _, inputs, n=n: look(n, inputs)) for n in layers]
    model.eval()(PIXELS)
    for hook in hooks:
        hook.remove()
    return seen


def is_two_of_four(weight: torch.Tensor) -> bool:
    return bool(((weight.movedim(1, -1).unflatten(-1, (-1, 4)) != 0).sum(-1) <= 2).all())


@EVERY
def test_every_layer_is_quantised_and_its_weights_stay(kind):
    """Ranges are the largest numbers, per output and of all inputs; keys, weights, statistics and mode stay."""
    model = tower(kind)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    seen = largest_inputs(model, LAYERS[kind])
    made = modelopt.insert(model.train(), [PIXELS[:4], PIXELS[4:]])
    after, held = modelopt.split(made.state_dict())
    assert made.training
    assert sorted(quantised_layers(made)) == sorted(LAYERS[kind])
    assert after.keys() == before.keys()
    assert all(after[key].equal(before[key]) for key in before)
    for name in LAYERS[kind]:
        torch.testing.assert_close(held[f"{name}.input_quantizer._amax"], seen[name])
        weight = before[f"{name}.weight"]
        assert held[f"{name}.weight_quantizer._amax"].flatten().equal(weight.abs().flatten(1).amax(1))


@EVERY
def test_weights_are_rounded_and_learn(kind):
    """What the model says is that of rounded numbers, and gradients reach the weights behind them."""
    model = tower(kind)
    with torch.no_grad():
        exact = model.eval()(PIXELS)
        rounded = modelopt.insert(model, [PIXELS])(PIXELS)
    assert not rounded.equal(exact)
    assert torch.nn.functional.cosine_similarity(rounded, exact).min() > 0.98
    train(model)
    layers = dict(model.named_modules())
    assert all(layers[name].weight.grad.abs().sum() > 0 for name in LAYERS[kind])


def test_masks_are_those_of_modelopts_sparsity():
    """So that it is no second backend of compress.sparsity: it would leave the same weights."""
    ours, theirs = tower("timm"), mts.sparsify(tower("timm"), "sparse_magnitude")
    sparse, layers = sparsify(ours), dict(theirs.named_modules())
    assert sparse
    for name, layer in ours.named_modules():
        if name in sparse:
            assert layer.sparsity_mask.equal(layers[name]._weight_mask.bool())


@EVERY
def test_sparse_layers_stay_sparse(kind):
    """sparsify, insert, train: two of four, in the weights and in what the quantisers make of them."""
    model = tower(kind)
    sparse = sparsify(model)
    assert sparse
    modelopt.insert(model, [PIXELS])
    assert set(sparse) <= set(quantised_layers(model))
    before = {name: layer.weight.clone() for name, layer in model.named_modules() if name in sparse}
    train(model)
    for name, layer in model.named_modules():
        if name in sparse:
            assert not layer.weight.equal(before[name])
            assert is_two_of_four(layer.weight)
            assert is_two_of_four(layer.weight_quantizer(layer.weight))


@EVERY
def test_image_onnx(kind, tmp_path):
    """Q/DQ before every layer, its weights 8-bit integers, still 2:4; and it says what the tower says, at any batch."""
    trained = tower(kind)
    sparse = sparsify(trained)
    train(modelopt.insert(trained, [PIXELS]))
    model = modelopt.insert(tower(kind), [torch.zeros(2, 3, 32, 32)])  # as an export makes it: ranges come with it
    model.load_state_dict(without_masks(trained.state_dict()))
    modelopt.write(model, tmp_path / "image.onnx", torch.zeros(2, 3, 32, 32))
    graph = onnx.load(tmp_path / "image.onnx").graph
    integers = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in graph.initializer if t.data_type == 3}
    dequantised = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    weights = [integers[name] for name in dequantised.values() if name in integers]
    assert len(weights) == len(LAYERS[kind])
    assert sum(w.shape[1] % 16 == 0 and w.shape[0] % 8 == 0 and is_two_of_four(w) for w in weights) == len(sparse)
    assert not any(node.op_type == "QuantizeLinear" and node.input[0] in integers for node in graph.node)
    session = onnxruntime.InferenceSession(tmp_path / "image.onnx", providers=["CPUExecutionProvider"])
    for rows in (1, 2, 5):
        with torch.no_grad():
            ours = model.eval()(PIXELS[:rows])
        theirs = torch.from_numpy(session.run(["image_features"], {"image": PIXELS[:rows].numpy()})[0])
        assert theirs.shape == (rows, 8)
        assert torch.nn.functional.cosine_similarity(ours, theirs).min() > 0.999


def test_int8_weights_are_what_the_quantisers_make(tmp_path):
    """integers * scale = the fake-quantised weight, of linear and convolutional layers."""
    model = modelopt.insert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(7200, 5)), [PIXELS])
    modelopt.write(model, tmp_path / "image.onnx", PIXELS[:2])
    graph = onnx.load(tmp_path / "image.onnx").graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    constants |= {n.output[0]: numpy_helper.to_array(n.attribute[0].t) for n in graph.node if n.op_type == "Constant"}
    found = [n.input for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in constants]
    assert len(found) == 2
    for layer, (weight, scale, _) in zip((model[0], model[2]), found, strict=True):
        integers = constants[weight]
        assert integers.dtype == np.int8
        shape = [-1] + [1] * (integers.ndim - 1)
        made = integers * constants[scale].reshape(shape)
        torch.testing.assert_close(torch.from_numpy(made), layer.weight_quantizer(layer.weight.detach()))
