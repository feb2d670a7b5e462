"""ONNX files whose weights lie beside the graph, as they do above 2 GB; here of a small model."""

from __future__ import annotations

import shutil

import pytest
import torch
from fake_hub import FakeHub
from push.test_push import push

from kd_accel.evals.encoder import load_encoder
from kd_accel.export import onnx_files
from kd_accel.export.verb import run
from kd_accel.export_config import ExportConfig
from kd_accel.schema import ConfigError

pytest.importorskip("onnxscript", reason='the extra "export" is not installed')
pytest.importorskip("onnxruntime", reason='the extra "export" is not installed')

VIEWS = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
TEXTS = ["a photo of a cat", "two dogs", ""]


@pytest.fixture(scope="module")
def large(releases, tmp_path_factory):
    """A release whose graphs are over the limit, which is 0."""
    out = tmp_path_factory.mktemp("large") / "student"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_files, "LARGEST", 0)
        run(ExportConfig(model=str(releases("vit")), out=str(out), format="onnx"))
    return out


def test_weights_lie_beside_the_graph(large):
    """At least those of the tower, 4 bytes each: of the text tower the token table alone."""
    assert {path.name for path in large.glob("*.data")} == {"image.onnx.data", "text.onnx.data"}
    assert (large / "text.onnx.data").stat().st_size > 4 * 49408 * 16 > 10 * (large / "text.onnx").stat().st_size


def test_they_are_found_in_another_folder(large, releases, tmp_path):
    """Graphs name their weights by file name alone; evaluation reads both, and the id is of both."""
    moved, student = shutil.copytree(large, tmp_path / "moved"), load_encoder(releases("vit"))
    images, texts = load_encoder(moved / "image.onnx"), load_encoder(moved / "text.onnx")
    torch.testing.assert_close(images.encode_images(VIEWS), student.encode_images(VIEWS), atol=1e-4, rtol=0)
    torch.testing.assert_close(texts.encode_texts(TEXTS), student.encode_texts(TEXTS), atol=1e-4, rtol=0)
    weights = moved / "image.onnx.data"
    weights.write_bytes(bytes(weights.stat().st_size))
    assert load_encoder(moved / "image.onnx").image_id != load_encoder(large / "image.onnx").image_id


def test_a_graph_without_its_weights_is_refused(large, tmp_path):
    """In one line."""
    shutil.copytree(large, tmp_path / "half", ignore=shutil.ignore_patterns("*.data"))
    with pytest.raises(
        ConfigError, match=r"^.*image\.onnx: onnxruntime cannot load it: .*External data path does not exist.*$"
    ):
        load_encoder(tmp_path / "half" / "image.onnx")


def test_they_are_pushed_too(large, tmp_path):
    """Byte for byte."""
    with FakeHub() as hub:
        push(hub, tmp_path, str(large), "repo=me/large")
        assert hub.repos["me/large"].files == {path.name: path.read_bytes() for path in large.iterdir()}
