"""The class head that lies beside a model, for predictions without texts."""

from __future__ import annotations

from pathlib import Path

from kd_accel.evals.onnx_encoder import is_onnx
from kd_accel.models.class_head import FILE, ClassHead, read_class_head
from kd_accel.models.onnx_meta import FILE as META
from kd_accel.models.onnx_meta import OnnxMeta
from kd_accel.models.release_folder import resolve_release


def class_head_of(model: str, embed_dim: int) -> ClassHead | None:
    """Of a run, checkpoint, release or ONNX files; None where there is none. Raises ConfigError for a damaged one."""
    path = Path(model)
    if is_onnx(path):
        folder = path if path.is_dir() else path.parent
        name = OnnxMeta.from_json(folder / META).class_head
        return None if name is None else read_class_head(folder / name, embed_dim)
    if not path.is_dir():
        return None  # a model's name
    file = resolve_release(model) / FILE
    return read_class_head(file, embed_dim) if file.is_file() else None
