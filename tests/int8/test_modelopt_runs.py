"""INT8 training from a dense run to image.onnx: what is asked for, kept, resumed and exported."""

from __future__ import annotations

import json
import sys

import pytest
import tiny
from safetensors.torch import load_file, save_file

from kd_accel import checkpoint, int8
from kd_accel.config import TrainConfig
from kd_accel.evals.encoder import load_encoder
from kd_accel.export.verb import run as export
from kd_accel.export_config import ExportConfig
from kd_accel.models.int8_state import FILE, read_int8
from kd_accel.models.sparsity import best_two_of_four
from kd_accel.schema import ConfigError, validate
from kd_accel.train import run

WEIGHTS = "open_clip_model.safetensors"
PAIR = {"terms": {"clip": {"kind": "clip"}}}


@pytest.fixture
def needs_modelopt():
    for package in ("modelopt", "onnxruntime"):
        pytest.importorskip(package, reason='the extras "quant" and "export" are not installed')


@pytest.fixture
def train(tmp_path, train_shards):
    """A function that trains a student and returns the run's folder."""

    def go(name, init=None, steps=4, **changes):
        student = {"arch": tiny.arch(32)} | ({} if init is None else {"init": str(init)})
        values = {
            "name": name,
            "output_dir": str(tmp_path / "runs"),
            "precision": "fp32",
            "data": {"shards": str(train_shards), "batch_size": 8, "num_workers": 0},
            "student": student,
            "objective": PAIR,
            "optim": {"lr": 1e-2, "steps": steps, "weight_decay": 0.1},
            "save": {"every_steps": 2},
        }
        run(validate(TrainConfig, values | changes))
        return tmp_path / "runs" / name

    return go


def student_of(folder):
    return checkpoint.newest(folder) / "student"


def exported(model, out, format_="open_clip", **changes):
    export(validate(ExportConfig, {"model": str(model), "out": str(out), "format": format_, **changes}))
    return out


@pytest.mark.usefixtures("needs_modelopt")
def test_dense_then_sparse_int8_then_onnx(tmp_path, train):
    """The release is an ordinary float one with the zeros, and brings what image.onnx is made from."""
    dense = train("dense")
    small = train("small", dense, compress={"sparsity": "2:4", "int8": "modelopt"}, train={"ema_decay": 0.5})
    before, after = (load_file(student_of(folder) / WEIGHTS) for folder in (dense, small))
    assert after.keys() == before.keys()
    sparse = [key for key, weight in after.items() if weight.ndim > 1 and (weight == 0).float().mean() == 0.5]
    assert {"visual.transformer.resblocks.0.mlp.c_fc.weight"} <= set(sparse)
    assert all(((after[key] != 0) == best_two_of_four(before[key])).all() for key in sparse)
    assert read_int8(student_of(small)).backend == "modelopt"
    out = exported(small, tmp_path / "out", "open_clip,onnx")
    assert load_file(out / FILE).keys() == load_file(student_of(small) / FILE).keys()
    averaged = load_file(checkpoint.newest(small) / "student_ema" / WEIGHTS)
    assert all(averaged[key].equal(tensor) for key, tensor in load_file(out / WEIGHTS).items() if key != "logit_scale")
    card = (out / "README.md").read_text()
    row = next(line for line in card.splitlines() if line.startswith("| int8 |"))
    assert float(row.split("|")[2]) < 0.01
    assert "1 - cosine" in card
    assert json.loads((out / "meta.json").read_text())["image"]["size"] == [32, 32]
    assert load_encoder(small).encode_texts(["a"]).isfinite().all()


@pytest.mark.usefixtures("needs_modelopt")
def test_the_image_tower_brings_its_quantisers(tmp_path, train):
    """Into a CLIP that is put together; a text tower alone brings none."""
    dense = train("dense", steps=2)
    small = train("small", dense, compress={"int8": "modelopt"}, steps=2)
    assert (exported(dense, tmp_path / "one", image_from=str(small)) / FILE).exists()
    assert not (exported(dense, tmp_path / "other", text_from=str(small)) / FILE).exists()


@pytest.mark.usefixtures("needs_modelopt")
def test_a_run_goes_on_with_its_ranges(train):
    """Even if the run that it started from has moved on meanwhile; it ends where an uninterrupted one does."""
    dense, compress = train("dense", steps=2), {"sparsity": "2:4", "int8": "modelopt"}
    whole = train("whole", dense, compress=compress)
    train("dense", steps=6, resume="auto", optim={"lr": 1e-1, "steps": 6, "weight_decay": 0.1})
    middle = str(whole / "checkpoints" / "step_00000002")
    branch = train("branch", dense, compress=compress, resume=middle)
    for file in (WEIGHTS, FILE):
        ours, theirs = (load_file(student_of(folder) / file) for folder in (branch, whole))
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) for key in theirs)
    assert load_file(student_of(whole) / WEIGHTS)["visual.conv1.weight"].isfinite().all()
    with pytest.raises(ConfigError, match="compress.int8: the checkpoint has 'modelopt', the config None"):
        train("other", dense, compress={"sparsity": "2:4"}, resume=middle)


@pytest.mark.usefixtures("needs_modelopt")
def test_quantisers_of_another_model_are_refused(tmp_path, train):
    """Cut off, of other layers, of an unknown backend: one line that names the file."""
    dense = train("dense", steps=2)
    release = student_of(train("small", dense, compress={"int8": "modelopt"}, steps=2))
    held = load_file(release / FILE)
    metadata = {"backend": "modelopt"}
    damaged = {
        "other layers": (lambda: save_file({"x": held.popitem()[1]}, release / FILE, metadata), "not of this model's"),
        "other backend": (lambda: save_file(held, release / FILE, {"backend": "os"}), "names the backend 'os'"),
        "cut off": (lambda: (release / FILE).write_bytes(b"12345678"), "truncated"),
    }
    for damage, said in damaged.values():
        damage()
        with pytest.raises(ConfigError, match=f"{FILE}.*{said}"):
            exported(release, tmp_path / "out", "onnx")
        assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("needs_modelopt")
def test_an_image_tower_that_nobody_reads_is_said(tmp_path, train, tiny_teacher):
    dense = train("dense", steps=2)
    kl = {"terms": {"text": {"kind": "embedding_kl", "match": {"text": "text"}}}}
    with pytest.raises(ConfigError, match="compress.int8 quantises the image tower.*no term reads"):
        train(
            "text",
            dense,
            compress={"int8": "modelopt"},
            objective=kl,
            teacher={"path": str(tiny_teacher)},
            student={"arch": tiny.arch(32), "init": str(dense), "projector": "linear"},
        )


def test_an_untrained_student_has_no_ranges(train):
    with pytest.raises(ConfigError, match="compress.int8 takes ranges.*student.init"):
        train("fresh", compress={"int8": "modelopt"})


def test_a_missing_package_is_said(monkeypatch):
    monkeypatch.delitem(sys.modules, "kd_accel.int8.modelopt", raising=False)
    monkeypatch.setitem(sys.modules, "modelopt", None)
    with pytest.raises(ConfigError, match=r'int8 by modelopt needs.*pip install "kd-accel\[quant\]"'):
        int8.backend("modelopt")
