"""kd-accel predict without texts: the class head that a run trained, of the run, its export and its ONNX files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from kd_accel.cli import main
from kd_accel.config import TrainConfig
from kd_accel.data.transforms import decode, eval_view
from kd_accel.evals.encoder import load_encoder
from kd_accel.models.class_head import FILE
from kd_accel.schema import validate
from kd_accel.train import run as train

CLASSES = ["blue", "red square", "yellow"]


def picture_folder(folder: Path) -> Path:
    """Eight pictures of each class, in a sub-folder with its name."""
    rng = np.random.default_rng(1)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(8):
            (folder / name / f"{number}.jpg").write_bytes(tiny.picture(tiny.COLORS[name.split()[0]], rng))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with pictures/, and runs/classifier, which learned their classes in two steps, with a moving average."""
    place = tmp_path_factory.mktemp("classifier")
    values = {
        "name": "classifier",
        "output_dir": str(place / "runs"),
        "precision": "fp32",
        "data": {"folder": str(picture_folder(place / "pictures")), "label": "auto", "batch_size": 8, "num_workers": 0},
        "student": {"arch": tiny.arch(), "num_classes": len(CLASSES)},
        "objective": {"terms": {"label": {"kind": "label_ce"}}},
        "optim": {"lr": 1e-2, "steps": 2},
        "train": {"ema_decay": 0.5},
    }
    train(validate(TrainConfig, values))
    return place


def predict(capsys, model: Path, *words: str) -> list[dict]:
    assert main(["predict", str(model), *map(str, words), "json_lines=true", "top_k=3"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def student_of(place: Path) -> Path:
    """That of the checkpoint, without the moving average."""
    return place / "runs" / "classifier" / "checkpoints" / "step_00000002" / "student"


def test_a_checkpoint_keeps_the_trained_head(place):
    """As it is among the run's weights; the moving average has one of its own."""
    weights = load_file(student_of(place).parent / "state" / "weights.safetensors")
    head, averaged = load_file(student_of(place) / FILE), load_file(student_of(place).with_name("student_ema") / FILE)
    assert head["weight"].equal(weights["class_head.weight"])
    assert head["bias"].equal(weights["class_head.bias"])
    assert not averaged["weight"].equal(head["weight"])


def test_classes_are_ranked_by_the_head(place, capsys):
    """Softmax of the linear layer on raw features; names are those of the sub-folders that it learned from."""
    found = predict(capsys, student_of(place), place / "pictures")
    assert len(found) == 24
    encoder, head = load_encoder(student_of(place)), load_file(student_of(place) / FILE)
    for entry in found:
        view = eval_view(decode(Path(entry["image"]).read_bytes()), encoder.image_input)[None]
        expected = (encoder.encode_images(view) @ head["weight"].T + head["bias"]).softmax(-1)[0]
        order = expected.argsort(descending=True).tolist()
        assert [guess["index"] for guess in entry["guesses"]] == order
        assert [guess["text"] for guess in entry["guesses"]] == [CLASSES[index] for index in order]
        given = torch.tensor([guess["probability"] for guess in entry["guesses"]])
        torch.testing.assert_close(given, expected[order])


def test_exported_it_says_the_same(place, tmp_path, capsys):
    """As a release, and as ONNX files alone."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason='the extra "export" is not installed')
    out, alone = tmp_path / "out", tmp_path / "alone"
    assert main(["export", str(student_of(place)), f"out={out}", "format=open_clip,onnx"]) == 0
    alone.mkdir()
    for name in ("image.onnx", "text.onnx", "meta.json", FILE):
        shutil.copy(out / name, alone)
    capsys.readouterr()
    picture = place / "pictures" / "red square" / "0.jpg"
    ours = predict(capsys, student_of(place), picture)
    assert predict(capsys, out, picture) == ours
    for model in (alone, alone / "image.onnx"):
        (theirs,) = predict(capsys, model, picture)
        assert [guess["text"] for guess in theirs["guesses"]] == [guess["text"] for guess in ours[0]["guesses"]]
        one, other = ([guess["probability"] for guess in entry["guesses"]] for entry in (ours[0], theirs))
        assert one == pytest.approx(other, abs=1e-5)
    assert "`class_head.safetensors` (weight, bias) turns" in (out / "README.md").read_text()
    assert {oct(file.stat().st_mode & 0o777) for file in out.iterdir()} == {"0o644"}


def nameless(place: Path, folder: Path) -> Path:
    """The student with a head that does not know its classes' names."""
    from safetensors.torch import save_file

    shutil.copytree(student_of(place), folder)
    save_file(load_file(folder / FILE), folder / FILE)
    return folder


def test_names_can_be_given(place, tmp_path, capsys):
    """In a file, in the order of the class numbers; without any there are the numbers."""
    model, picture = nameless(place, tmp_path / "model"), place / "pictures" / "blue" / "0.jpg"
    (tmp_path / "names.txt").write_text("x\ny\nz\n")
    named = predict(capsys, model, picture, f"classes={tmp_path / 'names.txt'}")[0]["guesses"]
    assert [guess["text"] for guess in named] == ["xyz"[guess["index"]] for guess in named]
    numbered = predict(capsys, model, picture)[0]["guesses"]
    assert [guess["text"] for guess in numbered] == [f"class {guess['index']}" for guess in numbered]


def test_texts_come_first(place, capsys):
    """A student with both is asked for texts where there are some."""
    found = predict(capsys, student_of(place), place / "pictures" / "blue" / "0.jpg", "text=[a cat, a dog]")
    assert {guess["text"] for guess in found[0]["guesses"]} == {"a cat", "a dog"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["classes=two.txt"], "classes=two.txt: 2 names, but the class head knows 3 classes"),
        (["classes=two.txt", "text=[a]"], "give it without prompts and text"),
        (["prompts=empty.txt"], "prompts: empty.txt is empty"),
    ],
)
def test_mistakes_are_one_line(place, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    Path("two.txt").write_text("a\nb\n")
    Path("empty.txt").touch()
    assert main(["predict", str(student_of(place)), str(place / "pictures"), *words]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert said in errors[0]


def test_a_tower_with_a_head_takes_no_texts(place, tmp_path, capsys):
    """The message names what does instead; its card calls it a classifier; a strange head is refused in a line."""
    model = tmp_path / "model"
    arch = {"embed_dim": 8, "vision_cfg": tiny.arch()["vision_cfg"]}
    tiny.write_teacher(model, arch)
    shutil.copy(student_of(place) / FILE, model)
    assert main(["predict", str(model), str(place / "pictures"), "text=[a]"]) == 2
    assert "has a class head and no text tower: leave the texts out, or name its classes" in capsys.readouterr().err
    assert main(["export", str(model), f"out={tmp_path / 'card'}"]) == 0
    assert "pipeline_tag: image-classification" in (tmp_path / "card" / "README.md").read_text()
    capsys.readouterr()
    (model / FILE).write_bytes(b"junk")
    for words in (["predict", str(model), str(place / "pictures")], ["export", str(model), f"out={tmp_path / 'out'}"]):
        assert main(words) == 2
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1
        assert "truncated, or not safetensors" in errors[0]
