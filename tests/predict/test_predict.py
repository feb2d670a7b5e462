"""kd-accel predict: the probabilities of zero-shot classification, for people, programs and a page."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from kd_accel.cli import main
from kd_accel.data.transforms import decode, eval_view
from kd_accel.evals.encoder import load_encoder

TEXTS = ["a red square", "a blue square", "<b>bold</b>", "a dog"]


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return tiny.write_teacher(tmp_path_factory.mktemp("model") / "untrained")


@pytest.fixture
def pictures(tmp_path):
    """Two pictures in a folder, and one below it."""
    folder = tmp_path / "pictures"
    for number, name in enumerate(("b.png", "a.jpg", "more/c.png")):
        pixels = np.random.default_rng(number).integers(0, 256, (50, 40, 3), dtype=np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    return tmp_path / "prompts.txt"


def lines(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_probabilities_are_the_softmax_of_cosines(release, pictures, prompts, capsys):
    """With the template around every text, best first; folders are read in the order of their paths."""
    words = [str(release), str(pictures), f"prompts={prompts}", "template=this is {c}!", "logit_scale=7"]
    assert main(["predict", *words, "json_lines=true", "top_k=3", "batch_size=2"]) == 0
    found = lines(capsys)
    assert [entry["image"] for entry in found] == [str(pictures / name) for name in ("a.jpg", "b.png", "more/c.png")]
    encoder = load_encoder(release)
    columns = encoder.unit(encoder.encode_texts([f"this is {text}!" for text in TEXTS]))
    for entry in found:
        with open(entry["image"], "rb") as file:
            view = eval_view(decode(file.read()), encoder.image_input)[None]
        expected = (7 * encoder.unit(encoder.encode_images(view)) @ columns.T).softmax(-1)[0]
        best = expected.argsort(descending=True)[:3].tolist()
        assert [guess["index"] for guess in entry["guesses"]] == best
        assert [guess["text"] for guess in entry["guesses"]] == [TEXTS[index] for index in best]
        given = torch.tensor([guess["probability"] for guess in entry["guesses"]])
        torch.testing.assert_close(given, expected[best])


def test_a_line_per_text_for_people(release, pictures, capsys):
    assert main(["predict", str(release), str(pictures / "a.jpg"), f"text=[{', '.join(TEXTS[:2])}]"]) == 0
    path, *rows = capsys.readouterr().out.splitlines()
    assert path == str(pictures / "a.jpg")
    shares = [float(re.fullmatch(r" *([\d.]+) %  a (red|blue) square", row)[1]) for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.2)


def test_paths_from_standard_input(release, pictures, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{pictures / 'b.png'}\n\n"))
    assert main(["predict", str(release), str(pictures / "a.jpg"), "-", "text=[a]", "json_lines=true"]) == 0
    assert [entry["image"] for entry in lines(capsys)] == [str(pictures / name) for name in ("a.jpg", "b.png")]


def test_pictures_that_cannot_be_read_do_not_stop_the_others(release, pictures, capsys):
    """A line each at the end, and the exit code 2."""
    (pictures / "aa.jpg").write_bytes(b"junk")
    words = [str(pictures / name) for name in ("aa.jpg", "absent.jpg", "b.png")]
    assert main(["predict", str(release), *words, "text=[a, b]", "json_lines=true"]) == 2
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert [line.partition(": ")[2] for line in err.splitlines()] == [
        f"{pictures / 'aa.jpg'}: image cannot be decoded: none of JPEG, PNG, WEBP, GIF, BMP",
        f"{pictures / 'absent.jpg'}: cannot be read: No such file or directory",
    ]


def test_the_page_has_every_picture_and_escapes_every_text(release, pictures, prompts, tmp_path):
    page = tmp_path / "out.html"
    assert main(["predict", str(release), str(pictures), f"prompts={prompts}", f"html={page}"]) == 0
    text = page.read_text()
    assert text.count('<img src="data:image/jpeg;base64,') == 3
    assert text.count("&lt;b&gt;bold&lt;/b&gt;") >= 3
    assert "<b>" not in text
    assert "http" not in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["text=[]"], "give either prompts=FILE or text=[...]"),
        (["text=[a]", "prompts=p.txt"], "give either prompts=FILE or text=[...]"),
        (["prompts=absent.txt"], "absent.txt cannot be read"),
        (["text=[a]", "template=x"], "template"),
    ],
)
def test_mistakes_are_one_line(release, pictures, words, said, capsys):
    assert main(["predict", str(release), str(pictures), *words]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1


def test_an_empty_folder_is_said(release, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["predict", str(release), str(tmp_path / "empty"), "text=[a]"]) == 2
    assert "no picture in this folder" in capsys.readouterr().err
