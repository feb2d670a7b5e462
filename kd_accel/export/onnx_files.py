"""A CLIP as ONNX: image.onnx, text.onnx and meta.json, which says what they are (models/onnx_meta.py).

Each tower is a graph of its own, for batches of any size: normalised pixels, or tokens at the full context length, to
raw features. Above 2 GB the weights lie beside a graph, in NAME.onnx.data.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import HFTokenizer
from torch import Tensor, nn

from kd_accel.int8 import Int8Tower
from kd_accel.models.class_head import FILE as CLASS_HEAD
from kd_accel.models.onnx_meta import FILE, OnnxImage, OnnxMeta, OnnxText
from kd_accel.models.scale import Scale
from kd_accel.models.text import encode_text
from kd_accel.schema import ConfigError, one_line
from kd_accel.types import ImageInput, InputContract, TextInput

OPSET = 18
LARGEST = 2**31 - 2**20  # bytes of one file: protobuf ends there
MAX_BATCH = 4096


class _ImageGraph(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model.encode_image(image)


class _TextGraph(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, text: Tensor) -> Tensor:
        return encode_text(self.model, text)


def write_onnx(
    directory: Path,
    *,
    model: nn.Module,
    contract: InputContract,
    embed_dim: int,
    scale: Scale,
    name: str,
    int8: Int8Tower | None = None,
) -> None:
    """Add the files of the towers that `model` has, fp32 on the CPU in eval mode, to `directory`.

    `int8` takes the place of the image tower. A tokenizer of transformers and a class head must lie there already.
    Raises ConfigError for a tower that cannot be exported, and where the extra is not installed.
    """
    image = text = None
    if contract.image is not None:
        example = torch.zeros(2, 3, *contract.image.size)
        with _exporting("image"):
            if int8 is not None:
                int8.write(directory / "image.onnx", example)
            else:
                _write(_ImageGraph(model), "image", example, directory)
        image = _image(contract.image)
    if contract.text is not None:
        with _exporting("text"):
            _write(_TextGraph(model), "text", contract.text.tokenize(["a", "b"]), directory)
        text = _text(contract.text)
    logit_scale = float(torch.tensor(scale.log_scale).exp())
    meta = OnnxMeta(
        name=name,
        embed_dim=embed_dim,
        logit_scale=logit_scale,
        logit_bias=scale.bias,
        image=image,
        text=text,
        class_head=CLASS_HEAD if (directory / CLASS_HEAD).is_file() else None,
    )
    (directory / FILE).write_text(meta.to_json(), encoding="utf-8")


def _write(graph: nn.Module, name: str, example: Tensor, directory: Path) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in graph.state_dict().values())
    torch.onnx.export(
        graph.eval(),
        (example,),
        directory / f"{name}.onnx",
        dynamo=True,
        opset_version=OPSET,
        input_names=[name],
        output_names=[f"{name}_features"],
        dynamic_shapes={name: {0: torch.export.Dim("batch", min=1, max=MAX_BATCH)}},
        external_data=size > LARGEST,
        verify=False,
        verbose=False,
    )


@contextmanager
def _exporting(name: str) -> Iterator[None]:
    """The exporter's words and errors as ours."""
    try:
        import onnxscript  # noqa: F401  the exporter needs it, and says so only in the middle of its work
    except ImportError:
        raise ConfigError('format=onnx needs the extra "export": pip install "kd-accel[export]"') from None
    said, before = logging.getLogger("torch.onnx"), logging.getLogger("torch.onnx").level
    said.setLevel(logging.ERROR)
    try:
        yield
    except Exception as error:  # what the exporter raises for a module it cannot trace has no narrower base
        raise ConfigError(
            f"format=onnx: the {name} tower cannot be exported ({one_line(error)}): leave this format out"
        ) from error
    finally:
        said.setLevel(before)


def _image(image: ImageInput) -> OnnxImage:
    return OnnxImage(
        size=image.size,
        mean=image.mean,
        std=image.std,
        interpolation=image.interpolation,
        resize_mode=image.resize_mode,
    )


def _text(text: TextInput) -> OnnxText:
    return OnnxText(context_length=text.context_length, **_tokenizer(text))


def _tokenizer(text: TextInput) -> dict[str, Any]:
    """open_clip's own tokenizer by name, others by their files."""
    return {"tokenizer": "folder" if isinstance(text.tokenize, HFTokenizer) else "clip_bpe"}
