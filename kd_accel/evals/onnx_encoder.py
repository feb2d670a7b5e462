"""The towers of an ONNX model, run by onnxruntime: FOLDER/{image.onnx,text.onnx,meta.json}.

models/onnx_meta.py says what the files hold. b rows of a batch, d embedding width.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor

from kd_accel.models.image import to_model_input
from kd_accel.models.onnx_meta import FILE, OnnxImage, OnnxMeta, OnnxText
from kd_accel.models.release_folder import CONFIG
from kd_accel.schema import ConfigError, one_line
from kd_accel.types import ImageInput, TextInput


@dataclass(frozen=True)
class OnnxImages:
    """image.onnx; it computes in the precision that it was exported in, whatever the config says."""

    file: Path
    meta: OnnxImage
    session: Any  # onnxruntime.InferenceSession
    embed_dim: int  # d
    device: torch.device  # where features go

    @property
    def wants(self) -> ImageInput:
        return ImageInput(**self.meta.model_dump(exclude={"file", "input", "output"}))

    @cached_property
    def id(self) -> str:
        """SHA-256 of the file, of the weights beside it, and of the preprocessing."""
        return _sha256(self.file, self.meta.model_dump_json(exclude={"file"}))

    def __call__(self, views: Tensor) -> Tensor:
        """[b, 3, H, W] uint8 views -> raw [b, d] fp32."""
        if not len(views):
            return torch.empty(0, self.embed_dim, device=self.device)
        pixels = to_model_input(views.to(self.device), self.wants, torch.float32)
        return _run(self.session, self.meta, pixels).to(self.device)


@dataclass(frozen=True)
class OnnxTexts:
    """text.onnx; it knows every text, with any prompt around it."""

    file: Path
    meta: OnnxText
    wants: TextInput
    session: Any  # onnxruntime.InferenceSession
    embed_dim: int  # d
    device: torch.device  # where features go

    @cached_property
    def id(self) -> str:
        """SHA-256 of the file, of the weights beside it, and of what the tokenizer is told."""
        return _sha256(self.file, self.meta.model_dump_json(exclude={"file"}))

    def check(self, texts: list[str]) -> None:
        """Every text is fine."""

    def templates(self, class_names: tuple[str, ...], templates: tuple[str, ...]) -> tuple[str, ...]:
        """All of them."""
        return templates

    def __call__(self, texts: list[str]) -> Tensor:
        """b texts -> raw [b, d] fp32."""
        if not texts:
            return torch.empty(0, self.embed_dim, device=self.device)
        return _run(self.session, self.meta, self.wants.tokenize(texts)).to(self.device)


def is_onnx(path: Path) -> bool:
    """A folder of ONNX files that is not also a release, or one such file."""
    return path.suffix == ".onnx" or (any(path.glob("*.onnx")) and not (path / CONFIG).is_file())


def open_onnx(path: Path, device: torch.device) -> tuple[OnnxMeta, OnnxImages | None, OnnxTexts | None]:
    """(meta.json, image tower, text tower) of a folder; of one of its .onnx files that tower alone.

    Raises ConfigError for what is missing or damaged, for graphs that meta.json does not describe, and where
    onnxruntime is not installed.
    """
    folder = path if path.is_dir() else path.parent
    meta = OnnxMeta.from_json(folder / FILE)
    image, text = (
        tower if tower and path in (folder, folder / tower.file) else None for tower in (meta.image, meta.text)
    )
    if image is None and text is None:
        raise ConfigError(f"{path}: {folder / FILE} names no such file")
    return (
        meta,
        None if image is None else _image_tower(folder / image.file, image, meta.embed_dim, device),
        None if text is None else _text_tower(folder / text.file, text, meta.embed_dim, device),
    )


def _image_tower(file: Path, meta: OnnxImage, embed_dim: int, device: torch.device) -> OnnxImages:
    return OnnxImages(file, meta, _session(file, meta, "tensor(float)", embed_dim), embed_dim, device)


def _text_tower(file: Path, meta: OnnxText, embed_dim: int, device: torch.device) -> OnnxTexts:
    session = _session(file, meta, "tensor(int64)", embed_dim)
    return OnnxTexts(file, meta, _text_input(file.parent, meta), session, embed_dim, device)


def _session(file: Path, tower: OnnxImage | OnnxText, kind: str, embed_dim: int) -> Any:
    """The graph, on the GPU where onnxruntime has one, ready for batches of any size."""
    try:
        import onnxruntime
    except ImportError:
        raise ConfigError(f'{file} needs onnxruntime: pip install "kd-accel[export]"') from None
    if not file.is_file():
        raise ConfigError(f"{file}: no such file, though {file.parent / FILE} names it")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # ranks share a machine
    known = onnxruntime.get_available_providers()
    providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in known]
    try:
        session = onnxruntime.InferenceSession(file, options, providers=providers)
    except Exception as error:  # its classes have no base of their own
        raise ConfigError(f"{file}: onnxruntime cannot load it: {one_line(error)}") from error
    inputs = {node.name: node for node in session.get_inputs()}
    outputs = {node.name: node for node in session.get_outputs()}
    if list(inputs) != [tower.input] or tower.output not in outputs:
        graph = f"{', '.join(inputs)} -> {', '.join(outputs)}"
        raise ConfigError(f"{file}: the graph is {graph}, but {FILE} says {tower.input} -> {tower.output}")
    given = inputs[tower.input]
    if given.type != kind or isinstance(given.shape[0], int):
        raise ConfigError(
            f"{file}: {tower.input} is {given.type} {given.shape}; needed is {kind} with a batch of any size: export it"
            " with a dynamic first dimension"
        )
    if (width := outputs[tower.output].shape[-1]) != embed_dim:
        raise ConfigError(f"{file}: {tower.output} is {width} wide, but {FILE} says embed_dim={embed_dim}")
    return session


def _text_input(folder: Path, text: OnnxText) -> TextInput:
    try:
        if text.tokenizer == "clip_bpe":
            tokenize = SimpleTokenizer(context_length=text.context_length, **text.options)
        else:
            tokenize = HFTokenizer(str(folder), text.context_length, trust_remote_code=False, **text.options)
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{folder / FILE}: text.tokenizer={text.tokenizer} cannot be had ({one_line(error)})"
        ) from error
    return TextInput(text.context_length, text.tokenizer, tokenize, pad=None)


def _run(session: Any, tower: OnnxImage | OnnxText, given: Tensor) -> Tensor:
    (features,) = session.run([tower.output], {tower.input: given.cpu().numpy()})
    return torch.from_numpy(features)


def _sha256(file: Path, described: str) -> str:
    found = hashlib.sha256(described.encode())
    for part in sorted(file.parent.glob(f"{file.name}*")):  # weights above 2 GB lie in NAME.onnx.data
        with part.open("rb") as stream:
            found.update(hashlib.file_digest(stream, "sha256").digest())
    return found.hexdigest()
