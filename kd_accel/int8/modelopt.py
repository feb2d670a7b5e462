"""INT8 by NVIDIA's Model Optimizer: weights with a scale per output, activations with one per tensor, all symmetric.

Linear and Conv2d that are used as layers take part, sparse ones too, and pools; not the matrices of an attention that
torch computes (open_clip's ViTs). A range is the largest number that the batches showed, and stays.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.nn import QuantLinearConvBase
from torch import Tensor, nn

from kd_accel.int8.onnx_weights import store_int8_weights
from kd_accel.models.sparsity import ATTENTION, SparseConv2d, SparseLinear

OPSET = 18

for kind in (SparseLinear, SparseConv2d):  # it knows torch's own layers, and of others only what it is told
    mtq.register(original_cls=kind, quantized_cls=QuantLinearConvBase)


def insert(tower: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Put fake quantisers into `tower`, with ranges from `batches` [b, 3, H, W]; the same module, in its old mode."""
    attention = [name for name, part in tower.named_modules() if isinstance(part, ATTENTION)]
    unused = [{"quantizer_name": f"{name}.*", "enable": False} for name in attention]
    config = {**mtq.INT8_DEFAULT_CFG, "quant_cfg": [*mtq.INT8_DEFAULT_CFG["quant_cfg"], *unused]}
    training = tower.training
    with torch.no_grad(), redirect_stdout(StringIO()):  # it prints how many
        mtq.quantize(tower.eval(), config, forward_loop=lambda model: [model(pixels) for pixels in batches])
    return tower.train(training)


def split(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the float tower's state, the ranges) of the state of such a tower."""
    held = {key: tensor for key, tensor in state.items() if "_quantizer." in key}
    return {key: tensor for key, tensor in state.items() if key not in held}, held


def write(tower: nn.Module, file: Path, example: Tensor) -> None:
    """Write image.onnx with Q/DQ around every layer and weights as int8: "image" [b, 3, H, W] -> "image_features".

    By torch's older exporter: the newer one cannot look into the quantisers.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is the older one, and which sizes it takes for constants
        torch.onnx.export(
            tower.eval(),
            (example,),
            str(file),
            dynamo=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["image_features"],
            dynamic_axes={"image": {0: "batch"}, "image_features": {0: "batch"}},
        )
    store_int8_weights(file)
