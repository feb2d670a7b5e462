"""kd-accel export int8=... calibrate=...: a float image tower becomes int8 without training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

from kd_accel.cli import main
from kd_accel.evals.encoder import load_encoder
from kd_accel.export.assemble import load_exported
from kd_accel.export.calibrate import NUM_PICTURES, check_float, read_pictures
from kd_accel.export_config import ExportConfig
from kd_accel.models.int8_state import Int8State, read_int8
from kd_accel.models.release import read_release
from kd_accel.schema import ConfigError


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Five pictures in two classes, and a file that is none."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number, color in enumerate([*tiny.COLORS.values(), (0, 0, 0)]):
        path = folder / f"{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(tiny.picture(color, rng))
    (folder / "1" / "broken.jpg").write_bytes(b"no picture")
    return folder


def image_input(releases):
    return read_release(releases("vit"))[1].image


def test_pictures_of_folders_and_shards(pictures, releases, train_shards):
    """All that can be read of few; of shards as of folders."""
    (pixels,) = read_pictures(str(pictures), image_input(releases))
    assert pixels.shape == (5, 3, 32, 32)
    of_folder, of_tar = (
        read_pictures(str(path), image_input(releases)) for path in (train_shards, train_shards / "00000.tar")
    )
    assert (len(of_folder[0]), len(of_tar[0])) == (40, 20)
    torch.testing.assert_close(of_folder[0][:20], of_tar[0], rtol=0, atol=0)


def test_of_many_pictures_some_are_taken_from_everywhere(tmp_path, releases):
    """Not the first ones alone: they may be of one class."""
    rng, number = np.random.default_rng(0), 2 * NUM_PICTURES
    dark, bright = (tiny.picture(color, rng) for color in ((0, 0, 0), (255, 255, 255)))
    for place in range(number):
        (tmp_path / f"{place:04d}.jpg").write_bytes(dark if place < number // 2 else bright)
    pixels = torch.cat(read_pictures(str(tmp_path), image_input(releases)))
    assert len(pixels) == NUM_PICTURES
    assert len(pixels.unique(dim=0)) == 2
    assert (pixels == pixels[0]).flatten(1).all(1).sum() == NUM_PICTURES // 2


@pytest.mark.parametrize("backend", ["torchao", "modelopt"])
def test_a_float_student_becomes_int8(tmp_path, releases, pictures, backend, capsys):
    """Its features are near; console and card say how near; what was found travels with the release."""
    for package in (backend, "onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed: kd-accel[export,quant,quant-cpu]")
    out, again = tmp_path / "made", tmp_path / "again"
    words = ["format=onnx", f"int8={backend}", f"calibrate={pictures}"]
    assert main(["export", str(releases("vit")), f"out={out}", *words]) == 0
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("int8: cosine"))
    assert said.endswith("over 5 pictures")
    assert read_int8(out).backend == backend
    assert (
        f"quantised after training by {backend}, with the ranges that 5 pictures showed"
        in (out / "README.md").read_text()
    )
    assert main(["export", str(out), f"out={again}", "format=onnx"]) == 0
    views = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    made, made_again, wanted = (
        load_encoder(path).encode_images(views) for path in (out / "image.onnx", again / "image.onnx", releases("vit"))
    )
    assert torch.equal(made, made_again)
    assert 0.99 < F.cosine_similarity(made, wanted).min() < 1 - 1e-7


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["format=onnx", "int8=torchao"], "int8 and calibrate belong together"),
        (["format=onnx", "calibrate=photos"], "int8 and calibrate belong together"),
        (["int8=torchao", "calibrate=photos"], "add onnx to format"),
    ],
)
def test_half_of_it_is_refused(tmp_path, releases, capsys, words, said):
    """In one line, before anything is written."""
    assert main(["export", str(releases("vit")), f"out={tmp_path / 'out'}", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not any(tmp_path.iterdir())


def test_what_cannot_be_quantised_is_refused(tmp_path, releases):
    """A text tower alone, and a student that is int8 already."""
    text, both = (load_exported(ExportConfig(model=str(releases(k)), out="x")) for k in ("text alone", "vit"))
    with pytest.raises(ConfigError, match="int8=torchao: .*this model has none"):
        check_float(text, "int8=torchao")
    check_float(both, "int8=torchao")
    with pytest.raises(ConfigError, match="int8=torchao: .*quantised already"):
        check_float(replace(both, int8=Int8State("torchao", {})), "int8=torchao")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere", "no such folder"),
        ("empty", "."),
        ("broken", "none of 1 pictures can be read"),
        ("no.tar", "do not exist"),
    ],
)
def test_pictures_that_are_not_to_be_had(tmp_path, releases, name, said):
    """The key and what is wrong, in one line."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=f"^calibrate={tmp_path / name}: .*{said}") as error:
        read_pictures(str(tmp_path / name), image_input(releases))
    assert "data." not in str(error.value)
