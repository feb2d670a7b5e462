"""INT8 by torchao's PT2E: activations as uint8 with a zero point, weights as int8 with a scale per output channel.

Made for ONNX Runtime on CPUs. What of the traced graph multiplies by a weight matrix takes part: Linear and Conv2d,
sparse ones too, and the matrices of attention. The range of an activation is what the batches showed, and stays; that
of a weight follows the weight.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from copy import deepcopy
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchao.quantization.pt2e import FakeQuantize, FusedMovingAvgObsFakeQuantize
from torchao.quantization.pt2e.observer import MinMaxObserver, MovingAveragePerChannelMinMaxObserver
from torchao.quantization.pt2e.prepare import prepare
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)

OPSET = 18
_BATCH = {0: torch.export.Dim("batch", min=1, max=4096)}
HELD = "int8."  # before the keys of what the quantisers hold

_BATCH_NORM = torch.ops.aten.batch_norm.default  # input, weight, bias, mean, variance, training, momentum, eps
_DROPOUT = torch.ops.aten.dropout.default  # input, p, training
_CONV = torch.ops.aten.conv2d.default  # input, weight, bias
_PRODUCTS = (_CONV, torch.ops.aten.linear.default)

_ACTIVATION = QuantizationSpec(
    dtype=torch.uint8,
    observer_or_fake_quant_ctr=FakeQuantize.with_args(observer=MinMaxObserver),
    quant_min=0,
    quant_max=255,
    qscheme=torch.per_tensor_affine,
)
_WEIGHT = QuantizationSpec(
    dtype=torch.int8,
    observer_or_fake_quant_ctr=FusedMovingAvgObsFakeQuantize.with_args(
        observer=MovingAveragePerChannelMinMaxObserver, averaging_constant=1
    ),
    quant_min=-127,
    quant_max=127,
    qscheme=torch.per_channel_symmetric,
    ch_axis=0,
)


class _Products(Quantizer):
    """Both factors of every product with a weight. torchao's own for x86 goes by classes, and misses attention."""

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        first: dict[fx.Node, fx.Node] = {}  # who reads an activation first: the others share its range
        for node in model.graph.nodes:
            if node.target in _PRODUCTS:
                activation, weight = node.args[:2]
                shared = SharedQuantizationSpec((activation, first.setdefault(activation, node)))
                spec = _ACTIVATION if first[activation] is node else shared
                specs = {activation: spec, weight: _WEIGHT}
                node.meta["quantization_annotation"] = QuantizationAnnotation(input_qspec_map=specs, _annotated=True)
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """Nothing to look for: each product is annotated once."""


class GraphTower(nn.Module):
    """A tower as a graph with fake quantisers: parts and state keys of the tower, and "int8.*".

    The graph computes in fp32, whatever dtype an engine keeps the weights in: bf16 rounds as coarsely as int8 does.
    BatchNorm has the mode of its module, dropout that of the tower; other randomness of training, such as stochastic
    depth, is off.
    """

    def __init__(self, tower: nn.Module, graph: fx.GraphModule):
        super().__init__()
        for kind in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
            getattr(self, kind).update(getattr(tower, kind))
        self.training = tower.training
        self.int8 = nn.ModuleDict({k: part for k, part in graph.named_children() if isinstance(part, FakeQuantize)})
        self.__dict__["graph"] = graph  # not a part of this module: it computes with the tensors of this one

    def forward(self, image: Tensor) -> Tensor:
        """Normalised pixels [b, 3, H, W] -> [b, d], both of one dtype."""
        self._set_modes()
        with torch.autocast(image.device.type, enabled=False):
            return functional_call(self.graph, self.tensors(), (image.float(),)).to(image.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """What the graph reads of the tower, floating-point tensors as fp32.

        In one order on all ranks: ZeRO adds up gradients in the order in which they come back through the casts.
        """
        read = {node.target for node in self.graph.graph.nodes if node.op == "get_attr"}
        own = chain(self.named_parameters(), self.named_buffers())
        return {name: t.float() if t.is_floating_point() else t for name, t in own if name in read}

    def _set_modes(self) -> None:
        """Traced graphs know no train() and eval(): the mode is an argument of their nodes."""
        changed = False
        for node in self.graph.graph.nodes:
            if node.target is _BATCH_NORM:
                changed |= _set_argument(node, 5, self.get_submodule(node.args[3].target.rpartition(".")[0]).training)
            elif node.target is _DROPOUT:
                changed |= _set_argument(node, 2, self.training)
        if changed:
            self.graph.recompile()


def insert(tower: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """`tower` as a graph with fake quantisers, with ranges from `batches` [b, 3, H, W]; its parts and mode are shared.

    Batches lie on the device that the tower computes on: the graph remembers it.
    """
    training = tower.training
    batches = iter(batches)
    first = next(batches)
    quantised = GraphTower(tower, _prepared(tower.eval(), first)).eval()
    with torch.no_grad():
        for batch in chain([first], batches):
            quantised(batch)
    for part in quantised.int8.values():
        if part.qscheme == torch.per_tensor_affine:
            part.disable_observer()
    return quantised.train(training)


def split(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the float tower's state, what the quantisers hold) of the state of such a tower."""
    held = {key: tensor for key, tensor in state.items() if key.startswith(HELD)}
    return {key: tensor for key, tensor in state.items() if key not in held}, held


def write(tower: nn.Module, file: Path, example: Tensor) -> None:
    """Write image.onnx with weights as int8: "image" [b, 3, H, W] -> "image_features" [b, d], for every b.

    The tower is on the CPU, in fp32; `example` is a batch of pixels.
    """
    tower = deepcopy(tower).eval()
    with torch.no_grad():
        tower(example)  # sets the modes
        tower.graph.load_state_dict(tower.tensors(), strict=False)
        _fold_batch_norms(tower.graph)
        tower.graph(example)  # the ranges of the folded weights
    converted = convert_pt2e(tower.graph)
    nn.Module.train(converted, False)  # the graph is that of eval mode, and has no eval() to say so
    torch.onnx.export(
        converted,
        (example,),
        file,
        dynamo=True,
        opset_version=OPSET,
        input_names=["image"],
        output_names=["image_features"],
        dynamic_shapes=(_BATCH,),
        external_data=False,
        verify=False,
        verbose=False,
    )


def _prepared(tower: nn.Module, batch: Tensor) -> fx.GraphModule:
    """The traced tower with fake quantisers whose ranges are unknown."""
    example = batch[:1].expand(2, -1, -1, -1)  # a batch of one would be traced as such
    graph = torch.export.export(tower, (example,), dynamic_shapes=(_BATCH,)).module()
    quantizer = _Products()
    quantizer.annotate(graph)
    # not prepare_qat_pt2e: it puts the BatchNorms of convolutions in terms of its own, with eps 1e-5 and momentum 0.1
    # whatever they had, and divides by their weights, which a fresh ResNet has as zeros
    return prepare(graph, {}, is_qat=True, obs_or_fq_callback=quantizer.prepare_obs_or_fq_callback)


def _fold_batch_norms(graph: fx.GraphModule) -> None:
    """Eval mode's BatchNorm after a convolution becomes part of its weight and bias.

    A factor per output channel, as the scales are: the integers stay those of the training, up to their sign.
    """
    for number, norm in enumerate([node for node in graph.graph.nodes if node.target is _BATCH_NORM]):
        conv = norm.args[0]
        if conv.target is not _CONV or len(conv.users) > 1:
            continue
        gamma, beta, mean, variance = (_tensor(graph, argument) for argument in norm.args[1:5])
        conv_bias = _tensor(graph, conv.args[2] if len(conv.args) > 2 else None)
        ones = torch.ones(len(mean), 1, 1, 1)
        factor, bias = fuse_conv_bn_weights(ones, conv_bias, mean, variance, norm.args[7], gamma, beta)
        quantiser = conv.args[1]
        with graph.graph.inserting_before(quantiser):
            scaled = graph.graph.call_function(
                torch.ops.aten.mul.Tensor, (quantiser.args[0], _constant(graph, f"factor_{number}", factor))
            )
        quantiser.args = (scaled,)
        with graph.graph.inserting_before(conv):
            conv.args = (*conv.args[:2], _constant(graph, f"bias_{number}", bias), *conv.args[3:])
        norm.replace_all_uses_with(conv)
        graph.graph.erase_node(norm)
    graph.recompile()


def _tensor(graph: fx.GraphModule, node: fx.Node | None) -> Tensor | None:
    return None if node is None else operator.attrgetter(node.target)(graph)


def _constant(graph: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    graph.register_buffer(name, value.detach())
    return graph.graph.get_attr(name)


def _set_argument(node: fx.Node, place: int, value: bool) -> bool:
    """Whether it was another one."""
    changed = node.args[place] is not value
    node.update_arg(place, value)
    return changed
