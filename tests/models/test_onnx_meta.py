"""meta.json is read back as it was written."""

from __future__ import annotations

import json

import pytest

from kd_accel.models.onnx_meta import OnnxImage, OnnxMeta, OnnxText
from kd_accel.schema import ConfigError

IMAGE = OnnxImage(size=(32, 48), mean=(0.1, 0.2, 0.3), std=(1, 1, 0.5), interpolation="bicubic", resize_mode="squash")
TEXT = OnnxText(context_length=77, tokenizer="folder", options={"clean": "lower"})


@pytest.mark.parametrize("towers", [{"image": IMAGE}, {"text": TEXT}, {"image": IMAGE, "text": TEXT}])
def test_round_trip(towers, tmp_path):
    meta = OnnxMeta(name="student", embed_dim=512, logit_scale=100.0, **towers)
    (tmp_path / "meta.json").write_text(meta.to_json())
    assert OnnxMeta.from_json(tmp_path / "meta.json") == meta
    assert json.loads(meta.to_json())["format"] == "kd_accel.onnx/1"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("format", "kd_accel.onnx/2", "meta.json: format: should be 'kd_accel.onnx/1'"),
        ("embed_dim", 0, "meta.json: embed_dim: should be greater than 0"),
        ("image", {"size": [32, 32]}, "meta.json: image.mean: this key is needed"),
    ],
)
def test_every_problem_names_the_file_and_the_key(key, value, said, tmp_path):
    values = json.loads(OnnxMeta(name="student", embed_dim=512, logit_scale=100.0, image=IMAGE).to_json())
    (tmp_path / "meta.json").write_text(json.dumps(values | {key: value}))
    with pytest.raises(ConfigError, match=said):
        OnnxMeta.from_json(tmp_path / "meta.json")
