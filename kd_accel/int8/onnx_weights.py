"""Weights of a Q/DQ graph as int8: a quarter of the file, and the same numbers.

Exporters write fp32 weight -> QuantizeLinear -> DequantizeLinear; here the first of the two is carried out.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np


def store_int8_weights(file: Path) -> int:
    """Replace every QuantizeLinear of a constant by what it gives, in place; returns how many there were."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(file)
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    folded = [n for n in graph.node if n.op_type == "QuantizeLinear" and all(name in constants for name in n.input)]
    for node in folded:
        weight, scale, zero = (numpy_helper.to_array(constants[name]) for name in node.input)
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        shape = [-1 if d == axis else 1 for d in range(weight.ndim)] if scale.ndim else ()
        rounded = np.rint(weight / scale.reshape(shape)) + zero.reshape(shape)
        limits = np.iinfo(zero.dtype)
        integers = rounded.clip(limits.min, limits.max).astype(zero.dtype)
        graph.initializer.append(numpy_helper.from_array(integers, node.output[0]))
        graph.node.remove(node)
    read = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)
    onnx.save(model, file)
    return len(folded)
